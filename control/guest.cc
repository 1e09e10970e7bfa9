// SPDX-License-Identifier: Apache-2.0
#include "control/guest.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <functional>
#include <mutex>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "control/side_by_side.h"
#include "images/probe/probe_blob.h"
#include "virtio/mmio_transport.h"
#include "virtio/rng_device.h"
#include "vmm/host_probe.h"
#include "vmm/layout.h"
#include "vmm/processors.h"
#include "vmm/terminal.h"

namespace minivmm::control {
namespace {

base::UniqueFd make_eventfd() {
  base::UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd) throw base::errno_error(errno, "eventfd");
  return fd;
}

}  // namespace

// Tells a disk's device that the disk was resized, as long as there is one.
class Guest::SizeWatcher final : public block::Node::ContentWatcher {
 public:
  void set_device(virtio::MmioBlock* device) noexcept {
    const std::lock_guard lock(mutex_);
    device_ = device;
  }
  void content_changed(uint64_t, uint64_t) noexcept override {}
  bool wants_content() const noexcept override { return false; }
  void size_changed(uint64_t, uint64_t) noexcept override {
    const std::lock_guard lock(mutex_);
    if (device_ != nullptr) device_->resize();
  }

 private:
  std::mutex mutex_;
  virtio::MmioBlock* device_ = nullptr;  // guarded by mutex_
};

// A disk's device, glued to the machine's bus and event descriptors.
class Guest::Slot final : public vmm::BusDevice {
 public:
  // `watcher` watches the handle's disk already.
  Slot(vmm::Machine& machine, block::Handle handle, const Disk& disk,
       std::vector<base::EventLoop*> loops, std::function<void(const std::string&)> on_stop,
       std::function<void(const virtio::FailedRequest&)> on_error,
       std::shared_ptr<SizeWatcher> watcher)
      : irqfd_(make_eventfd()), watcher_(std::move(watcher)) {
    virtio::BlockOptions options;
    options.name = disk.node_name;
    options.serial = disk.device.serial.empty() ? disk.node_name.substr(0, 20) : disk.device.serial;
    options.read_only = disk.read_only;
    options.logical_block_size = disk.device.logical_block_size;
    options.physical_block_size = disk.device.physical_block_size;
    options.num_queues = disk.device.num_queues;
    options.queue_size = disk.device.queue_size;
    options.read_error = disk.device.read_error;
    options.write_error = disk.device.write_error;
    options.on_stop = std::move(on_stop);
    options.on_error = std::move(on_error);
    options.indirect = disk.device.indirect;
    options.event_index = disk.device.event_index;
    options.legacy = disk.device.legacy;
    device_ = std::make_unique<virtio::MmioBlock>(std::move(handle), machine.memory(), options,
                                                  std::move(loops), irqfd_.get());
    const vmm::MmioSlot slot = machine.allocate_slot();
    machine.add_mmio_device(disk.node_name, slot, *this);
    machine.connect_irqfd(irqfd_.get(), slot.gsi);
    for (uint16_t q = 0; q < device_->queue_count(); ++q) {
      machine.connect_ioeventfd(device_->notify_fd(q), slot.base + virtio::MmioBlock::kNotifyOffset,
                                4, q);
    }
    watcher_->set_device(device_.get());
    device_->resize();  // what happened before that
  }
  ~Slot() override { watcher_->set_device(nullptr); }

  void read(uint64_t offset, std::span<std::byte> data) override { device_->read(offset, data); }
  void write(uint64_t offset, std::span<const std::byte> data) override {
    device_->write(offset, data);
  }
  virtio::MmioBlock& device() noexcept { return *device_; }

 private:
  base::UniqueFd irqfd_;
  const std::shared_ptr<SizeWatcher> watcher_;
  std::unique_ptr<virtio::MmioBlock> device_;
};

// The entropy device of a kernel.
class Guest::Rng final : public vmm::BusDevice {
 public:
  Rng(vmm::Machine& machine, base::EventLoop& loop)
      : irqfd_(make_eventfd()),
        device_(machine.memory(), loop, "rng", irqfd_.get()),
        transport_(device_, device_.signals(), "rng") {
    const vmm::MmioSlot slot = machine.allocate_slot();
    machine.add_mmio_device("rng", slot, *this);
    machine.connect_irqfd(irqfd_.get(), slot.gsi);
    machine.connect_ioeventfd(device_.notify_fd(), slot.base + virtio::MmioBlock::kNotifyOffset, 4,
                              0);
  }

  void read(uint64_t offset, std::span<std::byte> data) override { transport_.read(offset, data); }
  void write(uint64_t offset, std::span<const std::byte> data) override {
    transport_.write(offset, data);
  }
  void stop() { device_.stop(); }
  std::vector<std::string> describe() const { return {transport_.describe(), device_.describe()}; }

 private:
  base::UniqueFd irqfd_;
  virtio::RngDevice device_;
  virtio::MmioTransport transport_;
};

namespace {

vmm::DeviceListing device_listing(const std::string& how) {
  if (how == "auto") return vmm::DeviceListing::kAuto;
  if (how == "acpi") return vmm::DeviceListing::kAcpi;
  if (how == "command-line") return vmm::DeviceListing::kCommandLine;
  throw base::Error(EINVAL,
                    fmt::format("--devices {}: auto, acpi or command-line is expected", how));
}

// Where --pin puts threads; by the number of the vCPU or loop, none: anywhere.
struct Pins {
  std::vector<std::vector<unsigned>> vcpus;
  std::vector<std::vector<unsigned>> loops;
};

Pins parse_pins(const Boot& boot, size_t loops) {
  Pins out{std::vector<std::vector<unsigned>>(boot.cpus),
           std::vector<std::vector<unsigned>>(loops)};
  const auto numbered = [](const std::string& name, std::string_view kind, size_t count) {
    size_t number = count;
    if (!name.starts_with(kind)) return number;
    const char* const end = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + kind.size(), end, number);
    return parsed.ec == std::errc() && parsed.ptr == end ? std::min(number, count) : count;
  };
  for (const auto& [name, processors] : boot.processors) {
    vmm::check_processors(processors);
    const size_t vcpu = numbered(name, "vcpu", out.vcpus.size());
    const size_t io = numbered(name, "io", loops);
    if (vcpu < out.vcpus.size()) {
      out.vcpus[vcpu] = processors;
    } else if (io < loops) {
      out.loops[io] = processors;
    } else {
      throw base::Error(EINVAL, fmt::format("--pin {}: the threads are vcpu0 to vcpu{} and io0 to "
                                            "io{}",
                                            name, out.vcpus.size() - 1, loops - 1));
    }
  }
  return out;
}

// Where KVM interprets the guest's kernel, a Linux kernel needs help, and its user what to expect.
void prepare_for_emulated_host(vmm::MachineConfig& config) {
  if (vmm::kvm_uses_hardware()) return;
  config.complete_instructions = true;
  const std::string_view added = vmm::linux_arguments_without_hardware();
  if (!config.command_line.empty()) config.command_line += ' ';
  config.command_line += added;
  base::log_warning(
      "this KVM has no hardware virtualization: a Linux kernel boots slowly and mounts its root, "
      "but no program of it can run, because system calls do not work (see minivmm check-host)");
  base::log_info("added to the kernel's command line for this host: {}", added);
}

}  // namespace

void Guest::bind_loops(base::LoopGroup& loops, const Boot& boot) {
  const Pins pins = parse_pins(boot, loops.size());
  for (size_t i = 0; i < loops.size(); ++i) {
    const std::vector<unsigned>& processors = pins.loops[i];
    if (processors.empty()) continue;
    loops.loop(i).call("bind", [&] { vmm::run_on_processors(processors, fmt::format("io{}", i)); });
  }
}

// False: the disk carries no kernel.
bool Guest::use_disk_kernel(base::LoopGroup& loops, block::Graph& graph, const Disk& disk,
                            vmm::MachineConfig& config) {
  disk_kernel_ = find_disk_kernel(loops.loop(0), graph, disk.node_name, config.memory_bytes);
  if (!disk_kernel_) return false;
  const auto path = [](const base::UniqueFd& fd) {
    return fmt::format("/proc/self/fd/{}", fd.get());
  };
  for (const std::string& note : disk_kernel_->notes) {
    base::log_warning("disk '{}': {}", disk.node_name, note);
  }
  config.kernel.path = path(disk_kernel_->kernel);
  config.kernel.name = fmt::format("disk '{}', {}", disk.node_name, disk_kernel_->origin);
  if (disk_kernel_->initrd && config.initrd_path.empty()) {
    config.initrd_path = path(disk_kernel_->initrd);
  }
  std::string line = disk_kernel_->arguments;
  // The guest's only console. A boot loader knows of others.
  if (line.find("console=ttyS") == std::string::npos) line += " console=ttyS0";
  if (!config.command_line.empty()) line += ' ' + config.command_line;
  config.command_line = std::move(line);
  base::log_info("starting {}{}{}: {}", config.kernel.name, disk_kernel_->title.empty() ? "" : ", ",
                 disk_kernel_->title, config.command_line);
  return true;
}

Guest::Guest(base::LoopGroup& loops, block::Graph& graph, const SerialPort& serial,
             const Boot& boot, const std::vector<Disk>& disks, bool confine_threads,
             GuestEvents events)
    : events_(std::move(events)) {
  vmm::MachineConfig config;
  config.memory_bytes = boot.memory_bytes;
  config.shared_memory = boot.shared_memory;
  config.huge_page_bytes = boot.huge_page_bytes;
  config.prealloc = boot.prealloc;
  config.device_listing = device_listing(boot.devices);
  config.vcpus = boot.cpus;
  config.confine_threads = confine_threads;
  config.vcpu_processors = parse_pins(boot, loops.size()).vcpus;
  config.initrd_path = boot.initrd;
  config.command_line = boot.append;
  config.serial = serial.config();
  if (!boot.kernel.empty()) {
    config.kernel.path = boot.kernel;
  } else if (boot.probe || disks.empty() || !use_disk_kernel(loops, graph, disks[0], config)) {
    config.kernel.bytes = probe::probe_elf();
    config.kernel.name = "the probe guest";
  }
  is_probe_ = !config.kernel.bytes.empty();
  if (!is_probe_) prepare_for_emulated_host(config);
  machine_ = std::make_unique<vmm::Machine>(std::move(config));
  std::vector<std::shared_ptr<SizeWatcher>> watchers;
  std::vector<block::Handle> handles;
  loops.loop(0).call("attach disks", [&] {
    for (const Disk& disk : disks) {
      handles.push_back(graph.attach(disk.node_name, fmt::format("guest disk '{}'", disk.node_name),
                                     block::Permissions::front_end(!disk.read_only)));
      watchers.push_back(std::make_shared<SizeWatcher>());
      handles.back().watch(watchers.back());
    }
  });
  size_t first_loop = 0;
  for (size_t number = 0; number < disks.size(); ++number) {
    const Disk& disk = disks[number];
    // Queues of all disks go around the loops.
    std::vector<base::EventLoop*> queue_loops;
    for (size_t i = 0; i < loops.size(); ++i) {
      queue_loops.push_back(&loops.loop((first_loop + i) % loops.size()));
    }
    first_loop += disk.device.num_queues;
    slots_.push_back(std::make_unique<Slot>(
        *machine_, std::move(handles[number]), disk, std::move(queue_loops),
        [this](const std::string& why) { pause(why); },
        [this, name = disk.node_name](const virtio::FailedRequest& request) {
          if (events_.failed) events_.failed(name, request);
        },
        std::move(watchers[number])));
  }
  // Behind the disks, so that their windows are where they were without it. A machine that is full
  // of disks does without, as the probe guest does.
  if (boot.rng && !is_probe_ && disks.size() < vmm::kVirtioSlots) {
    rng_ = std::make_unique<Rng>(*machine_, loops.loop(0));
  }
}

Guest::~Guest() = default;

void Guest::pause(const std::string& why) {
  disk_failed_.store(true);
  const bool ran = !machine_->paused();
  machine_->pause();
  if (ran && events_.stopped) events_.stopped();
  base::log_error("{}; the guest is paused: put that right, then: kill -USR2 {}", why, ::getpid());
}

bool Guest::hold() {
  if (machine_->paused()) return false;
  machine_->pause();
  if (events_.stopped) events_.stopped();
  base::log_info("the guest is paused");
  return true;
}

std::string_view Guest::status() const noexcept {
  if (machine_->ended()) return "shutdown";
  if (!machine_->paused()) return "running";
  return disk_failed_.load() ? "io-error" : "paused";
}

void Guest::resume() {
  if (!machine_->paused()) return;
  base::log_info("the guest goes on");
  disk_failed_.store(false);
  // Requests last, and told before: one that fails again pauses the machine again, which must not
  // be undone, nor told too early.
  if (events_.resumed) events_.resumed();
  machine_->resume();
  for (const auto& slot : slots_) slot->device().resume();
}

bool Guest::stop(std::chrono::milliseconds timeout, std::vector<std::string>& problems) {
  // In this order: a vCPU may be waiting inside a device for its reset, which stop() ends.
  machine_->stop();
  // No key is the guest's any more: Ctrl-C must reach us where a disk hangs.
  vmm::restore_terminal();
  std::vector<virtio::StopReport> reports(slots_.size());
  std::vector<std::function<void()>> stops;
  for (size_t i = 0; i < slots_.size(); ++i) {
    stops.emplace_back([&, i] { reports[i] = slots_[i]->device().stop(timeout); });
  }
  if (rng_) rng_->stop();
  run_side_by_side(stops);
  bool idle = true;
  for (virtio::StopReport& report : reports) {
    idle = idle && report.idle;
    for (std::string& line : report.in_flight) problems.push_back(std::move(line));
    if (!report.error.empty()) problems.push_back(std::move(report.error));
  }
  (void)machine_->wait();
  return idle;
}

std::vector<std::string> Guest::describe() const {
  const vmm::Machine::Counters c = machine_->counters();
  std::vector<std::string> out{fmt::format(
      "guest: {}, {} exits, {} port and {} MMIO accesses, {} unclaimed, {} "
      "instructions completed, {} bytes of serial output dropped",
      machine_->ended()    ? "ended"
      : machine_->paused() ? "paused"
                           : "running",
      c.exits, c.port_accesses, c.mmio_accesses, c.unclaimed, c.completed, c.serial_dropped)};
  if (rng_) {
    for (std::string& line : rng_->describe()) out.push_back(std::move(line));
  }
  for (const auto& slot : slots_) {
    for (std::string& line : slot->device().describe()) out.push_back(std::move(line));
  }
  return out;
}

}  // namespace minivmm::control
