// SPDX-License-Identifier: Apache-2.0
// The virtual machine of a daemon with its disks. Built and used by the daemon.
#pragma once

#include <string>
#include <string_view>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/loop_group.h"
#include "block/graph/graph.h"
#include "control/config.h"
#include "control/disk_kernel.h"
#include "control/serial_port.h"
#include "virtio/mmio_block.h"
#include "vmm/machine.h"

namespace minivmm::control {

// What others want to hear of. On any thread; must not wait. Each may be empty.
struct GuestEvents {
  std::function<void()> stopped;
  std::function<void()> resumed;
  std::function<void(const std::string& disk, const virtio::FailedRequest&)> failed;
};

class Guest {
 public:
  // Makes the machine and a device for each disk. Throws; then nothing is left. Plain thread.
  // `serial` outlives it.
  Guest(base::LoopGroup& loops, block::Graph& graph, const SerialPort& serial, const Boot& boot,
        const std::vector<Disk>& disks, bool confine_threads, GuestEvents events = {});
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
  ~Guest();

  // Binds the loops to the processors that `boot` names for them. Once, before they are confined.
  // Throws for processors that are not there and threads that do not exist.
  static void bind_loops(base::LoopGroup& loops, const Boot& boot);

  void start() { machine_->start(); }
  vmm::Machine& machine() noexcept { return *machine_; }
  // The built-in guest, which mounts no file systems.
  bool is_probe() const noexcept { return is_probe_; }

  // Pauses it; false: it was paused already. Any thread.
  bool hold();
  // Goes on after that, or after a disk's error has paused the guest. Any thread.
  void resume();
  // QMP's word: running, paused, io-error, shutdown. Any thread.
  std::string_view status() const noexcept;

  // Stops the machine and its devices, closes their handles. Plain thread, once. Appends what did
  // not end well to `problems`; returns false if requests still run in guest memory (the process
  // must then exit without tearing down).
  bool stop(std::chrono::milliseconds timeout, std::vector<std::string>& problems);

  std::vector<std::string> describe() const;

 private:
  void pause(const std::string& why);
  class SizeWatcher;
  class Slot;  // one disk in its window
  class Rng;
  bool use_disk_kernel(base::LoopGroup& loops, block::Graph& graph, const Disk& disk,
                       vmm::MachineConfig& config);
  const GuestEvents events_;
  bool is_probe_ = false;
  std::atomic<bool> disk_failed_{false};   // and that is why it is paused
  std::optional<DiskKernel> disk_kernel_;  // read when the guest starts
  std::unique_ptr<vmm::Machine> machine_;
  std::vector<std::unique_ptr<Slot>> slots_;
  std::unique_ptr<Rng> rng_;
};

}  // namespace minivmm::control
