// SPDX-License-Identifier: Apache-2.0
// The virtio entropy device: fills the guest's buffers with the host's random numbers. One queue,
// served by a fiber of one event loop.
//
// Nothing it does can hang, so stopping always succeeds. Threads: stop() and what the transport
// calls on plain threads; describe() on any.
#pragma once

#include <string>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "base/event_loop.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "virtio/device.h"
#include "virtio/guest_memory.h"
#include "virtio/signals.h"

namespace minivmm::virtio {

class RngDevice final : public Device {
 public:
  // A request gets at most this many bytes; a driver takes what it gets.
  static constexpr uint32_t kMaxRequestBytes = 4096;

  // `memory`, `loop` (running) and `irqfd` (an eventfd, borrowed) outlive the device. Throws
  // base::Error if an eventfd cannot be made.
  RngDevice(const GuestMemory& memory, base::EventLoop& loop, std::string name, int irqfd);
  RngDevice(const RngDevice&) = delete;
  RngDevice& operator=(const RngDevice&) = delete;
  ~RngDevice() override;

  Signals& signals() noexcept { return signals_; }
  // Written for each notification of queue 0.
  int notify_fd() const noexcept { return notify_fd_.get(); }

  uint32_t device_id() const noexcept override;
  uint64_t features() const noexcept override;
  uint16_t queue_count() const noexcept override { return 1; }
  uint16_t max_queue_size() const noexcept override { return 64; }
  void read_config(uint64_t, std::span<std::byte>) override {}
  void write_config(uint64_t, std::span<const std::byte>) override {}
  void accept_features(uint64_t features) override { features_ = features; }
  void activate(std::span<const QueueSetup> queues) override;
  void notify(uint16_t queue) noexcept override;
  bool stop_queue(uint16_t queue) override;
  bool reset() override;

  // Serves no more, for good. Idempotent.
  void stop();
  std::string describe() const;

 private:
  class Worker;
  void end_worker(std::unique_lock<std::mutex>& lock);

  const GuestMemory& memory_;
  base::EventLoop& loop_;
  const std::string name_;
  Signals signals_;
  base::UniqueFd notify_fd_;
  uint64_t features_ = 0;  // while nothing runs
  base::RateLimit complaints_;

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::shared_ptr<Worker> worker_;
  bool worker_ended_ = false;
  bool stopped_ = false;
};

}  // namespace minivmm::virtio
