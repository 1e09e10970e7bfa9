// SPDX-License-Identifier: Apache-2.0
// The register window of a virtio device: virtio-mmio version 2 (virtio 1.2, section 4.2.2), or on
// request version 1 for drivers from before virtio 1.0 (section 4.2.4). Knows nothing of what the
// device does.
//
// read() and write() on plain threads (vCPUs), several at once. What a driver polls or does per
// request (InterruptStatus, InterruptACK, QueueNotify) takes no lock. A change of state that the
// device must finish (reset, start, stop of a queue) runs outside the lock, one at a time;
// meanwhile other registers answer, and further writes of Status wait for it.
#pragma once

#include <linux/virtio_config.h>
#include <string>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "base/log.h"
#include "virtio/device.h"
#include "virtio/signals.h"

namespace minivmm::virtio {

class MmioTransport {
 public:
  // Both outlive the transport. `name` stands in messages.
  MmioTransport(Device& device, Signals& signals, std::string name, bool legacy = false);
  MmioTransport(const MmioTransport&) = delete;
  MmioTransport& operator=(const MmioTransport&) = delete;

  // An access at `offset` of the window. Registers take 4 bytes, aligned; the configuration space
  // up to 8. Anything else reads as zero and is ignored when written. Never throws.
  void read(uint64_t offset, std::span<std::byte> data);
  void write(uint64_t offset, std::span<const std::byte> data);

  // One line on the negotiation, for state dumps. Any thread.
  std::string describe() const;

 private:
  uint32_t read_register(uint64_t offset);
  uint32_t read_selected(uint64_t offset);
  uint64_t offered_features() const noexcept;
  uint32_t read_legacy(uint64_t offset, const Device::QueueSetup* queue) const;
  void write_legacy(std::unique_lock<std::mutex>& lock, uint64_t offset, uint32_t value);
  void place_legacy_queue(std::unique_lock<std::mutex>& lock, uint32_t page);
  bool accept_legacy_features();
  void write_register(uint64_t offset, uint32_t value);
  void write_selected(uint64_t offset, uint32_t value);
  void write_driver_features(uint32_t value);
  void write_queue_ready(std::unique_lock<std::mutex>& lock, uint32_t value);
  void take_queue_back(std::unique_lock<std::mutex>& lock);
  void write_status(uint32_t value);
  void add_driver_status(std::unique_lock<std::mutex>& lock, uint32_t added);
  bool features_acceptable() const;
  void start_device(std::unique_lock<std::mutex>& lock);
  void reset_device(std::unique_lock<std::mutex>& lock);
  void forget_driver();
  bool has(uint32_t status_bit) const noexcept { return (signals_.status() & status_bit) != 0; }
  bool may_set_up_queues() const noexcept;
  Device::QueueSetup* selected_queue();
  void complain(const char* what, uint64_t value);

  Device& device_;
  Signals& signals_;
  const std::string name_;
  const bool legacy_;
  base::RateLimit complaints_;

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  bool changing_ = false;  // somebody has left the lock to change the device's state
  uint32_t device_features_select_ = 0;
  uint32_t driver_features_select_ = 0;
  uint64_t driver_features_ = 0;
  bool unknown_features_ = false;  // the driver set bits beyond the first 64
  uint32_t queue_select_ = 0;
  std::vector<Device::QueueSetup> queues_;
  // Version 1 only: a queue is given by the number of its first page.
  uint32_t guest_page_size_ = 0;  // outlives resets: Linux says it once, before its first one
  std::vector<uint32_t> queue_pages_;
  std::vector<uint32_t> queue_alignments_;
};

}  // namespace minivmm::virtio
