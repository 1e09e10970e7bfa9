// SPDX-License-Identifier: Apache-2.0
#include "vmm/machine.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "vmm/acpi.h"
#include "vmm/console.h"
#include "vmm/image_reader.h"
#include "vmm/kick.h"
#include "vmm/kvm_api.h"
#include "vmm/layout.h"
#include "vmm/legacy_devices.h"
#include "vmm/memory.h"
#include "vmm/mp_table.h"
#include "vmm/serial.h"
#include "vmm/vcpu.h"

namespace minivmm::vmm {
namespace {

void signal_eventfd(int fd) noexcept {
  const uint64_t one = 1;
  (void)!::write(fd, &one, sizeof one);
}

base::UniqueFd make_eventfd(const char* what) {
  base::UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd) throw base::errno_error(errno, fmt::format("{}: cannot make an eventfd", what));
  return fd;
}

kvm_ioeventfd describe_ioeventfd(int eventfd, uint64_t address, uint32_t length,
                                 std::optional<uint64_t> match, uint32_t flags) {
  kvm_ioeventfd out{};
  out.addr = address;
  out.len = length;
  out.fd = eventfd;
  out.flags = flags;
  if (match) {
    out.flags |= KVM_IOEVENTFD_FLAG_DATAMATCH;
    out.datamatch = *match;
  }
  return out;
}

// Linux with hardware-reduced ACPI and no `reboot=` jumps to the reset vector in real mode:
// mov $1, %al; mov $kPowerPort, %dx; out %al, %dx; 1: hlt; jmp 1b
std::array<std::byte, 9> reset_code() {
  constexpr uint8_t kCode[] = {0xb0, 0x01, 0xba, kPowerPort & 0xff, kPowerPort >> 8, 0xee,
                               0xf4, 0xeb, 0xfd};
  std::array<std::byte, 9> out{};
  std::transform(std::begin(kCode), std::end(kCode), out.begin(),
                 [](uint8_t byte) { return std::byte{byte}; });
  return out;
}

}  // namespace

class Machine::Impl final : public VcpuHost {
 public:
  explicit Impl(MachineConfig config);
  ~Impl() override;

  // VcpuHost.
  const Bus& ports() const override { return ports_; }
  const Bus& mmio() const override { return mmio_; }
  bool ending() const noexcept override { return ended_.load(std::memory_order_acquire); }
  bool confine_threads() const noexcept override { return config_.confine_threads; }
  bool paused() const noexcept override { return paused_.load(std::memory_order_acquire); }
  void wait_while_paused() noexcept override;
  void vcpu_ended(ExitReason reason) noexcept override { end(std::move(reason)); }
  bool triple_fault_is_reset() const noexcept override { return config_.triple_fault_is_reset; }
  const virtio::GuestMemory* completion_memory() const noexcept override {
    return config_.complete_instructions ? &memory_.view() : nullptr;
  }

  MmioSlot allocate_slot();
  void add_mmio_device(std::string_view name, const MmioSlot& slot, BusDevice& device);
  void add_port_device(std::string_view name, uint64_t base, uint64_t size, BusDevice& device);
  void connect_irqfd(int eventfd, uint32_t gsi);
  void ioeventfd(const kvm_ioeventfd& description);
  void start();
  void end(ExitReason reason) noexcept;
  void set_paused(bool on) noexcept;
  const ExitReason& wait();
  bool wait_for(std::chrono::milliseconds timeout);
  Counters counters() const noexcept;

  const MachineConfig config_;
  Kvm kvm_;
  base::UniqueFd vm_;
  Memory memory_;
  base::UniqueFd ended_fd_;
  Console console_;

 private:
  void create_vm_parts();
  void add_platform_devices();
  void add_memory_slots();
  void refuse_after_start(std::string_view what) const;
  BootState load();
  void write_firmware(bool acpi);
  void run_vcpus();

  Bus ports_{"port"};
  Bus mmio_{"mmio"};
  base::UniqueFd serial_irq_;
  Serial serial_;
  I8042 i8042_;
  EmptyCmos cmos_;
  PowerRegisters power_;
  DebugExit debug_exit_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
  std::string device_arguments_;
  std::vector<AcpiDevice> acpi_devices_;  // the same devices
  unsigned next_slot_ = 0;
  bool start_called_ = false;  // building thread only

  std::atomic<bool> ended_{false};
  std::atomic<bool> paused_{false};
  // Held while a reason is recorded and the vCPUs are kicked, so that whoever sees the reason under
  // it may join them.
  std::mutex mutex_;
  std::condition_variable changed_;
  ExitReason reason_;
  std::mutex join_mutex_;
};

Machine::Impl::Impl(MachineConfig config)
    : config_(std::move(config)),
      vm_(kvm_.create_vm()),
      memory_({.size = config_.memory_bytes,
               .shared = config_.shared_memory,
               .huge_pages = config_.huge_pages,
               .huge_page_bytes = config_.huge_page_bytes,
               .prealloc = config_.prealloc}),
      ended_fd_(make_eventfd("machine")),
      console_(
          config_.serial,
          [this] {
            end({ExitKind::kStopped, 0, "ended from the keyboard (Ctrl-A x)"});
          },
          config_.confine_threads),
      serial_irq_(make_eventfd("serial")),
      serial_(console_, [this] { signal_eventfd(serial_irq_.get()); }),
      i8042_([this](ExitReason reason) { end(std::move(reason)); }),
      power_([this](ExitReason reason) { end(std::move(reason)); }),
      debug_exit_([this](ExitReason reason) { end(std::move(reason)); }) {
  console_.attach(serial_);
  create_vm_parts();
  add_platform_devices();
}

Machine::Impl::~Impl() {
  end({ExitKind::kStopped, 0, "stopped by the host"});
  wait();
}

// The order matters to KVM: addresses of its own pages and the interrupt controllers before vCPUs.
void Machine::Impl::create_vm_parts() {
  const int most = std::clamp(kvm_.capability(KVM_CAP_MAX_VCPUS), 1, kMaxVcpus);
  if (config_.vcpus == 0 || config_.vcpus > static_cast<unsigned>(most)) {
    throw base::Error(EINVAL, fmt::format("{} vCPUs are not possible: 1 to {} on this host",
                                          config_.vcpus, most));
  }
  const uint64_t identity_map = kIdentityMapAddress;
  kvm_ioctl_checked(vm_.get(), KVM_SET_IDENTITY_MAP_ADDR, &identity_map,
                    "KVM_SET_IDENTITY_MAP_ADDR");
  if (kvm_ioctl_value(vm_.get(), KVM_SET_TSS_ADDR, kTssAddress) < 0) {
    throw base::errno_error(errno, "KVM: KVM_SET_TSS_ADDR failed");
  }
  add_memory_slots();
  if (kvm_ioctl_value(vm_.get(), KVM_CREATE_IRQCHIP, 0) < 0) {
    throw base::errno_error(errno, "KVM: cannot make the interrupt controllers");
  }
  const std::vector<kvm_cpuid_entry2> supported = kvm_.supported_cpuid();
  for (unsigned i = 0; i < config_.vcpus; ++i) {
    vcpus_.push_back(std::make_unique<Vcpu>(kvm_, supported, vm_.get(), i, config_.vcpus, *this));
  }
}

void Machine::Impl::add_memory_slots() {
  uint32_t slot = 0;
  for (const auto& region : memory_.view().regions()) {
    kvm_userspace_memory_region description{};
    description.slot = slot++;
    description.guest_phys_addr = region.guest_base;
    description.memory_size = region.size;
    description.userspace_addr = reinterpret_cast<uint64_t>(region.host);
    kvm_ioctl_checked(vm_.get(), KVM_SET_USER_MEMORY_REGION, &description,
                      "KVM_SET_USER_MEMORY_REGION");
  }
}

void Machine::Impl::add_platform_devices() {
  ports_.add(kSerialPort, Serial::kPorts, "serial", serial_);
  ports_.add(I8042::kBase, I8042::kPorts, "keyboard controller", i8042_);
  ports_.add(EmptyCmos::kBase, EmptyCmos::kPorts, "CMOS", cmos_);
  ports_.add(kPowerPort, PowerRegisters::kPorts, "power registers", power_);
  ports_.add(kDebugExitPort, DebugExit::kPorts, "exit port", debug_exit_);
  connect_irqfd(serial_irq_.get(), kSerialGsi);
}

void Machine::Impl::refuse_after_start(std::string_view what) const {
  if (start_called_) {
    throw base::Error(EBUSY,
                      fmt::format("{}: {} after the machine was started", config_.name, what));
  }
}

MmioSlot Machine::Impl::allocate_slot() {
  if (next_slot_ == kVirtioSlots) {
    throw base::Error(ENOSPC,
                      fmt::format("{}: at most {} devices fit", config_.name, kVirtioSlots));
  }
  const unsigned n = next_slot_++;
  return {kVirtioWindowBase + n * kVirtioWindowSize, kVirtioWindowSize, kVirtioFirstGsi + n};
}

void Machine::Impl::add_mmio_device(std::string_view name, const MmioSlot& slot,
                                    BusDevice& device) {
  refuse_after_start("a device cannot be added");
  if (memory_.view().at(slot.base, 1) != nullptr) {
    throw base::Error(
        EBUSY, fmt::format("{}: window of {} at {:#x} is in RAM", config_.name, name, slot.base));
  }
  mmio_.add(slot.base, slot.size, name, device);
  device_arguments_ +=
      fmt::format(" virtio_mmio.device={}K@{:#x}:{}", slot.size / 1024, slot.base, slot.gsi);
  acpi_devices_.push_back({slot.base, slot.size, slot.gsi});
}

void Machine::Impl::add_port_device(std::string_view name, uint64_t base, uint64_t size,
                                    BusDevice& device) {
  refuse_after_start("a device cannot be added");
  ports_.add(base, size, name, device);
}

void Machine::Impl::connect_irqfd(int eventfd, uint32_t gsi) {
  kvm_irqfd description{};
  description.fd = static_cast<uint32_t>(eventfd);
  description.gsi = gsi;
  kvm_ioctl_checked(vm_.get(), KVM_IRQFD, &description, "KVM_IRQFD");
}

void Machine::Impl::ioeventfd(const kvm_ioeventfd& description) {
  kvm_ioctl_checked(vm_.get(), KVM_IOEVENTFD, &description, "KVM_IOEVENTFD");
}

BootState Machine::Impl::load() {
  const KernelSource& source = config_.kernel;
  std::unique_ptr<ImageReader> kernel;
  if (!source.bytes.empty()) {
    kernel = std::make_unique<SpanReader>(source.name.empty() ? "built-in kernel" : source.name,
                                          source.bytes);
  } else if (!source.path.empty()) {
    kernel = std::make_unique<FileReader>(source.path);
  } else {
    throw base::Error(EINVAL, fmt::format("{}: no kernel was given", config_.name));
  }
  std::unique_ptr<ImageReader> initrd;
  if (!config_.initrd_path.empty()) initrd = std::make_unique<FileReader>(config_.initrd_path);
  LoadRequest request;
  request.kernel = kernel.get();
  request.initrd = initrd.get();
  request.command_line = config_.command_line;
  request.device_arguments = device_arguments_;
  request.listing = config_.device_listing;
  request.ram_size = memory_.size();
  request.protocol = config_.protocol;
  std::array<std::byte, 32> seed{};
  if (::getrandom(seed.data(), seed.size(), GRND_NONBLOCK) == ssize_t{seed.size()}) {
    request.rng_seed = seed;
  }
  const BootState state = load_kernel(request, memory_.view());
  write_firmware(state.acpi);
  return state;
}

// What a kernel expects of a PC's firmware and finds in memory.
void Machine::Impl::write_firmware(bool acpi) {
  const auto put = [&](uint64_t address, uint64_t end, std::span<const std::byte> bytes) {
    if (bytes.size() > end - address) {
      throw base::Error(ENOSPC, fmt::format("{}: {} bytes of firmware tables do not fit",
                                            config_.name, bytes.size()));
    }
    std::copy(bytes.begin(), bytes.end(),
              memory_.bytes(address, bytes.size(), "firmware tables").begin());
  };
  if (acpi) {
    put(kAcpiAddress, kMpTableAddress,
        make_acpi_tables({config_.vcpus, acpi_devices_}, kAcpiAddress));
  } else {
    // A kernel that reads neither ACPI nor kvmclock measures its clocks with the timer of a PC.
    kvm_pit_config timer{};
    timer.flags = KVM_PIT_SPEAKER_DUMMY;
    if (kvm_ioctl(vm_.get(), KVM_CREATE_PIT2, &timer) != 0) {
      base::log_debug("{}: KVM makes no PIT", config_.name);
    }
  }
  put(kMpTableAddress, kResetVectorAddress, make_mp_table(config_.vcpus, kMpTableAddress));
  put(kResetVectorAddress, kKernelAddress, reset_code());
}

void Machine::Impl::start() {
  refuse_after_start("started again");
  start_called_ = true;
  vcpus_.front()->set_boot_state(load());
  install_kick_handler();
  // Who waits for an end that comes at once finds all threads made, or none.
  const std::lock_guard join_lock(join_mutex_);
  if (ending()) return;
  console_.open();
  try {
    // The guest first: its thread starts while the others are made.
    run_vcpus();
    console_.start();
  } catch (const std::system_error& error) {
    end({ExitKind::kStopped, 0, "a thread could not be made"});
    throw base::errno_error(error.code().value(),
                            fmt::format("{}: cannot make a thread", config_.name));
  }
}

void Machine::Impl::run_vcpus() {
  std::lock_guard lock(mutex_);
  if (ended_.load()) return;
  const ServiceThreadSignals signals;
  for (size_t i = 0; i < vcpus_.size(); ++i) {
    vcpus_[i]->start(fmt::format("vcpu{}", i), i < config_.vcpu_processors.size()
                                                   ? config_.vcpu_processors[i]
                                                   : std::vector<unsigned>{});
  }
}

void Machine::Impl::end(ExitReason reason) noexcept {
  std::lock_guard lock(mutex_);
  if (ended_.load()) return;
  reason_ = std::move(reason);
  ended_.store(true, std::memory_order_release);
  for (const auto& vcpu : vcpus_) {
    if (vcpu->started()) vcpu->kick();
  }
  signal_eventfd(ended_fd_.get());
  changed_.notify_all();
}

void Machine::Impl::set_paused(bool on) noexcept {
  std::lock_guard lock(mutex_);
  paused_.store(on, std::memory_order_release);
  for (const auto& vcpu : vcpus_) {
    if (on && vcpu->started()) vcpu->kick();
  }
  changed_.notify_all();
}

void Machine::Impl::wait_while_paused() noexcept {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !paused_.load() || ended_.load(); });
}

const ExitReason& Machine::Impl::wait() {
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ended_.load(); });
  }
  std::lock_guard join_lock(join_mutex_);
  for (const auto& vcpu : vcpus_) vcpu->join();
  console_.stop();
  return reason_;
}

bool Machine::Impl::wait_for(std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [this] { return ended_.load(); });
}

Machine::Counters Machine::Impl::counters() const noexcept {
  Counters out;
  for (const auto& vcpu : vcpus_) {
    const auto& c = vcpu->counters();
    out.exits += c.exits.load(std::memory_order_relaxed);
    out.port_accesses += c.port_accesses.load(std::memory_order_relaxed);
    out.mmio_accesses += c.mmio_accesses.load(std::memory_order_relaxed);
    out.unclaimed += c.unclaimed.load(std::memory_order_relaxed);
    out.completed += c.completed.load(std::memory_order_relaxed);
  }
  out.serial_dropped = console_.dropped();
  return out;
}

Machine::Machine(MachineConfig config) : impl_(std::make_unique<Impl>(std::move(config))) {}
Machine::~Machine() = default;

const virtio::GuestMemory& Machine::memory() const noexcept { return impl_->memory_.view(); }
int Machine::memory_fd() const noexcept { return impl_->memory_.memfd(); }
MmioSlot Machine::allocate_slot() { return impl_->allocate_slot(); }
void Machine::add_mmio_device(std::string_view name, const MmioSlot& slot, BusDevice& device) {
  impl_->add_mmio_device(name, slot, device);
}
void Machine::add_port_device(std::string_view name, uint64_t base, uint64_t size,
                              BusDevice& device) {
  impl_->add_port_device(name, base, size, device);
}
void Machine::connect_irqfd(int eventfd, uint32_t gsi) { impl_->connect_irqfd(eventfd, gsi); }
void Machine::connect_ioeventfd(int eventfd, uint64_t address, uint32_t length,
                                std::optional<uint64_t> match) {
  impl_->ioeventfd(describe_ioeventfd(eventfd, address, length, match, 0));
}
void Machine::disconnect_ioeventfd(int eventfd, uint64_t address, uint32_t length,
                                   std::optional<uint64_t> match) {
  impl_->ioeventfd(
      describe_ioeventfd(eventfd, address, length, match, KVM_IOEVENTFD_FLAG_DEASSIGN));
}
void Machine::start() { impl_->start(); }
void Machine::stop() noexcept { impl_->end({ExitKind::kStopped, 0, "stopped by the host"}); }
void Machine::end(ExitReason reason) noexcept { impl_->end(std::move(reason)); }
void Machine::pause() noexcept { impl_->set_paused(true); }
void Machine::resume() noexcept { impl_->set_paused(false); }
bool Machine::paused() const noexcept { return impl_->paused(); }
const ExitReason& Machine::wait() { return impl_->wait(); }
bool Machine::wait_for(std::chrono::milliseconds timeout) { return impl_->wait_for(timeout); }
int Machine::ended_fd() const noexcept { return impl_->ended_fd_.get(); }
bool Machine::ended() const noexcept { return impl_->ending(); }
void Machine::type(std::string_view text) { impl_->console_.type(text); }
Machine::Counters Machine::counters() const noexcept { return impl_->counters(); }

}  // namespace minivmm::vmm
