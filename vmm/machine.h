// SPDX-License-Identifier: Apache-2.0
// One virtual machine: RAM, vCPUs, interrupt controllers, buses, serial port, boot. It is built by
// one thread (constructor, add_mmio_device, connect_*), then started once. From then on stop() and
// the other methods marked so may be called from any thread at any time.
//
// Devices are not owned: they, and the eventfds given here, must outlive wait() or the destructor.
// vCPU threads only run the guest and answer register accesses; queue notifications leave through
// eventfds (connect_ioeventfd) and interrupts come in through eventfds (connect_irqfd).
#pragma once

#include <string>
#include <string_view>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "virtio/guest_memory.h"
#include "vmm/bus.h"
#include "vmm/exit_reason.h"
#include "vmm/loader.h"

namespace minivmm::vmm {

// Where the kernel comes from: a file, or bytes that outlive start().
struct KernelSource {
  std::string path;                  // used if `bytes` is empty
  std::span<const std::byte> bytes;  // an image in memory
  std::string name;                  // for messages; defaults to the path
};

struct SerialConfig {
  int in_fd = -1;   // what is read here is typed into the guest; a terminal is made raw meanwhile
  int out_fd = -1;  // gets what the guest writes
  // Ctrl-A x ends the machine also where in_fd is no terminal that was made raw.
  bool escape = false;
  // If set, gets the output instead of out_fd. Called on one thread of the machine.
  std::function<void(std::span<const std::byte>)> on_output;
};

struct MachineConfig {
  std::string name = "minivmm";  // for messages and thread names
  uint64_t memory_bytes = uint64_t{256} << 20;
  bool shared_memory = false;  // RAM in a memfd
  bool huge_pages = true;
  uint64_t huge_page_bytes = 0;  // as MemoryConfig's
  bool prealloc = false;
  unsigned vcpus = 1;
  // The host's processors that vCPU i may run on; none or empty: all that the process may use.
  std::vector<std::vector<unsigned>> vcpu_processors{};
  KernelSource kernel;
  BootProtocol protocol = BootProtocol::kAuto;
  std::string initrd_path;  // optional; Linux and PVH kernels
  std::string command_line;
  DeviceListing device_listing = DeviceListing::kAuto;  // may add to the command line
  // Does instructions that KVM's emulator lacks. For hosts without hardware virtualization.
  bool complete_instructions = false;
  bool triple_fault_is_reset = false;  // for a guest that reboots that way; else it is a crash
  bool confine_threads = true;         // a filter of system calls for each (vmm/thread_filter.h)
  SerialConfig serial;
};

// Window and interrupt line of one virtio-mmio device.
struct MmioSlot {
  uint64_t base;
  uint64_t size;
  uint32_t gsi;
};

class Machine {
 public:
  // Opens KVM, makes the VM, its RAM and vCPUs. Throws base::Error that says what the host lacks
  // and what to do: ENOENT/EACCES for /dev/kvm, EOPNOTSUPP for a missing capability, EINVAL for the
  // configuration.
  explicit Machine(MachineConfig config);
  // Stops and waits.
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  const virtio::GuestMemory& memory() const noexcept;
  // The memfd of a machine with shared_memory, or -1.
  int memory_fd() const noexcept;

  // The next free virtio window and interrupt line. Throws base::Error(ENOSPC) after 19.
  MmioSlot allocate_slot();
  // Registers a virtio-mmio device: bus window, and an entry in the ACPI tables or on the kernel's
  // command line.
  // Throws base::Error: EBUSY for an overlap or after start().
  void add_mmio_device(std::string_view name, const MmioSlot& slot, BusDevice& device);
  // Other devices: the kernel is not told.
  void add_port_device(std::string_view name, uint64_t base, uint64_t size, BusDevice& device);

  // An edge on `gsi` for each time `eventfd` is written. Before start(). Throws base::Error.
  void connect_irqfd(int eventfd, uint32_t gsi);
  // A guest store of `length` bytes (1, 2, 4, 8; 0 = any) at `address` writes `eventfd` instead of
  // reaching the bus; with `match` only for that value. Any thread. Throws base::Error.
  void connect_ioeventfd(int eventfd, uint64_t address, uint32_t length,
                         std::optional<uint64_t> match);
  void disconnect_ioeventfd(int eventfd, uint64_t address, uint32_t length,
                            std::optional<uint64_t> match);

  // Loads the kernel and starts the vCPU threads. Once. Throws base::Error; the machine can then
  // only be destroyed. Returns at once if stop() came first.
  void start();

  // Asks the machine to end with kStopped; the first reason wins. Any thread, any time, also before
  // start() and from a device. Does not wait.
  void stop() noexcept;
  // Same, with a reason of the caller's.
  void end(ExitReason reason) noexcept;

  // Keeps the vCPUs from running until resume(), as soon as each has left the guest; does not wait
  // for that. Devices go on. Any thread, any time; again: no effect.
  void pause() noexcept;
  void resume() noexcept;
  bool paused() const noexcept;

  // Waits until the machine has ended and all its threads are gone. Any one thread except the
  // machine's own. Before start() it waits for stop().
  const ExitReason& wait();
  // Waits at most `timeout` for a reason to exist; true if it does.
  bool wait_for(std::chrono::milliseconds timeout);
  // An eventfd that becomes and stays readable once the machine has a reason to end, so that an
  // event loop can wait for it; then call wait(). Owned by the machine.
  int ended_fd() const noexcept;
  bool ended() const noexcept;

  // Types bytes into the guest's serial port; they wait in a queue of the machine until the guest
  // takes them. Any thread. Throws base::Error(ENOBUFS) if more than 64 KiB are waiting.
  void type(std::string_view text);

  // Counters for a status report. Any thread.
  struct Counters {
    uint64_t exits = 0;  // KVM_RUN returns
    uint64_t port_accesses = 0;
    uint64_t mmio_accesses = 0;
    uint64_t unclaimed = 0;       // accesses no device answered
    uint64_t completed = 0;       // instructions done in place of KVM
    uint64_t serial_dropped = 0;  // bytes of output lost because nobody read them
  };
  Counters counters() const noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace minivmm::vmm
