// SPDX-License-Identifier: Apache-2.0
// A virtio device as a transport sees it. The transport owns the negotiation and the driver's
// queue set-up; the device owns what happens after that.
//
// Threads: read_config and notify on any vCPU thread, several at once. accept_features, activate,
// stop_queue and reset one at a time (the transport sees to that).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "virtio/queue.h"

namespace minivmm::virtio {

class Device {
 public:
  // A queue as the driver set it up.
  struct QueueSetup {
    QueueLayout layout;
    bool ready = false;
  };

  virtual ~Device() = default;

  virtual uint32_t device_id() const noexcept = 0;
  // What is offered; never changes.
  virtual uint64_t features() const noexcept = 0;
  virtual uint16_t queue_count() const noexcept = 0;
  virtual uint16_t max_queue_size() const noexcept = 0;

  // The configuration space is as long as `data` reaches; what lies outside reads as zero and
  // ignores writes.
  virtual void read_config(uint64_t offset, std::span<std::byte> data) = 0;
  virtual void write_config(uint64_t offset, std::span<const std::byte> data) = 0;

  // The driver's choice, a subset of features().
  virtual void accept_features(uint64_t features) = 0;
  // Starts the queues that are ready. Throws base::Error if it cannot; reset() is then due.
  virtual void activate(std::span<const QueueSetup> queues) = 0;
  // The driver has put requests into a queue.
  virtual void notify(uint16_t queue) noexcept = 0;
  // Stops one queue. Returns when nothing of it is in flight; false if the device is being stopped
  // and gave up waiting.
  virtual bool stop_queue(uint16_t queue) = 0;
  // Back to the state before accept_features(). As stop_queue(), for all.
  virtual bool reset() = 0;
};

}  // namespace minivmm::virtio
