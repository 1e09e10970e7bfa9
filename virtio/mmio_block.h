// SPDX-License-Identifier: Apache-2.0
// A virtio block device on the virtio-mmio transport: what a machine places into a window of its
// bus. Knows no hypervisor.
//
//   MmioBlock disk(std::move(handle), machine.memory(), options, loops, irqfd);
//   for each queue q: connect_ioeventfd(disk.notify_fd(q), base + MmioBlock::kNotifyOffset, 4, q);
//   connect_irqfd(irqfd, gsi); bus: disk.read / disk.write
//
// To end: ask the machine to stop, call stop() here, then wait for the machine. In that order: a
// vCPU may be waiting inside write() for a reset, and stop() is what ends that wait.
//
// Threads: construct on any. read() and write() on plain threads (vCPUs), several at once. The
// queues run on fibers of the event loops given. The others as each says.
#pragma once

#include <string>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/event_loop.h"
#include "block/graph/handle.h"
#include "virtio/block_options.h"
#include "virtio/guest_memory.h"

namespace minivmm::virtio {

class BlockDevice;
class MmioTransport;

// How a device ended.
struct StopReport {
  // Nothing is in flight any more, and the disk's handle is closed. If not: requests that still run
  // refer to guest memory, so that must stay mapped until the process ends, and the loops cannot be
  // joined.
  bool idle = false;
  // What was still in flight at the deadline, a line each.
  std::vector<std::string> in_flight;
  // Why the last flush failed; empty if it did not.
  std::string error;
};

class MmioBlock {
 public:
  static constexpr uint64_t kWindowSize = 0x1000;  // bytes of address space
  static constexpr uint64_t kNotifyOffset = 0x50;  // QueueNotify: a 4-byte write of a queue's index

  // `memory` and `irqfd` (an eventfd, borrowed) outlive the device. Queue i runs on
  // loops[i % loops.size()], which must be running when the guest starts the device, and until
  // stop() has returned. Throws base::Error(EINVAL) for bad options, or why an eventfd cannot be
  // made.
  MmioBlock(block::Handle disk, const GuestMemory& memory, BlockOptions options,
            std::vector<base::EventLoop*> loops, int irqfd);
  MmioBlock(const MmioBlock&) = delete;
  MmioBlock& operator=(const MmioBlock&) = delete;
  // Stops, if that was not done, and logs what stop() would have reported.
  ~MmioBlock();

  uint16_t queue_count() const noexcept;
  // The eventfd that starts work on a queue; owned by the device. Writing it when there is nothing
  // to do does no harm. A write to QueueNotify that reaches write() has the same effect.
  int notify_fd(uint16_t queue) const noexcept;

  // A guest's access at `offset` of the window, of 1, 2, 4 or 8 bytes. Whatever the guest does,
  // these return and do not throw. write() blocks while the guest resets the device with requests
  // in flight: until they have completed, or stop() gives up on them.
  void read(uint64_t offset, std::span<std::byte> data);
  void write(uint64_t offset, std::span<const std::byte> data);

  // Tells the guest the size that the disk has now. Any thread or fiber.
  void resize();

  // Tries the requests again that wait after an error (ErrorAction::kStop). Any thread.
  void resume() noexcept;

  // Starts no more requests, waits for those in flight, flushes, and closes the handle. Ends when
  // that is done or after `timeout`. From then on the guest finds a device that does nothing. Any
  // thread or fiber, once; must not run on a fiber that holds up one of the device's loops.
  StopReport stop(std::chrono::milliseconds timeout);

  // The live state, a line each. Any thread.
  std::vector<std::string> describe() const;

 private:
  std::unique_ptr<BlockDevice> device_;
  std::unique_ptr<MmioTransport> transport_;
  bool stopped_ = false;
  bool idle_ = false;  // as stop() reported
};

}  // namespace minivmm::virtio
