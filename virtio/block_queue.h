// SPDX-License-Identifier: Apache-2.0
// The data path of one queue: from its ring through the engine and back.
//
// Lives from the driver's DRIVER_OK (or the start of the queue) until reset. Everything runs on
// fibers of one loop: a worker takes requests in batches, joins adjacent ones, starts each on a
// fiber of its own (which runs at once, so that what needs no waiting is done before the batch
// ends), and makes all completions of a batch or of a turn of the loop visible with one store and
// at most one interrupt. A watcher waits for the driver's notifications.
//
// Requests in flight live in a fixed set of slots, as many as the queue has entries; with none
// free, the ring waits. Only what is marked so may be called from other threads.
#pragma once

#include <string>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/cancel.h"
#include "base/event_loop.h"
#include "base/timer_queue.h"
#include "virtio/block_engine.h"
#include "virtio/queue.h"
#include "virtio/queue_poller.h"
#include "virtio/signals.h"

namespace minivmm::virtio {

class BlockQueue {
 public:
  struct Parts {
    BlockEngine& engine;
    Signals& signals;
    base::EventLoop& loop;
    const BlockOptions& options;
    uint16_t index;
    int notify_fd;
  };

  // `ended` is called once, on the loop, as the last thing that touches this object.
  BlockQueue(const Parts& parts, Queue queue, std::function<void(BlockQueue&)> ended);
  BlockQueue(const BlockQueue&) = delete;
  BlockQueue& operator=(const BlockQueue&) = delete;
  ~BlockQueue();

  uint16_t index() const noexcept { return parts_.index; }
  base::EventLoop& loop() const noexcept { return parts_.loop; }

  // The worker's body; on a fiber of the loop.
  void run() noexcept;
  // Takes no more requests; run() ends when those in flight have. On the loop.
  void request_stop() noexcept;

  // Any thread. One line, and a line for each request in flight (at most `limit`).
  std::string describe() const;
  void describe_in_flight(std::vector<std::string>& lines, size_t limit) const;

 private:
  struct Slot;
  // Written by the loop only, read by anyone.
  struct Counter {
    std::atomic<uint64_t> value{0};
    void add(uint64_t n) noexcept {
      value.store(value.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
    }
    uint64_t get() const noexcept { return value.load(std::memory_order_relaxed); }
  };

  void watch_notifications() noexcept;
  void wake_worker() noexcept;
  void sleep() noexcept;
  void wait_for_work() noexcept;
  bool look_for_work() noexcept;
  void disarm() noexcept;

  unsigned take_batch() noexcept;
  bool accept(Slot& slot, const Chain& chain) noexcept;
  bool join(Slot& slot) noexcept;
  void start(Slot& first) noexcept;
  void run_group(Slot& first) noexcept;
  void finish(Slot& slot, uint8_t status) noexcept;
  bool publish() noexcept;
  void report_broken() noexcept;

  Slot* take_slot() noexcept;
  void give_back(Slot& slot) noexcept;

  static constexpr unsigned kBatch = 32;  // enough to amortise, few enough to answer early

  const Parts parts_;
  Queue queue_;
  const std::function<void(BlockQueue&)> ended_;
  QueuePoller poller_;

  std::unique_ptr<iovec[]> segments_;  // of all slots; pages never used cost nothing
  std::unique_ptr<Slot[]> slots_;
  const uint32_t slot_segments_;
  Slot* free_ = nullptr;

  // The groups of the batch being taken.
  Slot* groups_[kBatch];
  unsigned group_count_ = 0;
  base::Clock::time_point batch_time_;

  base::CancelSource stop_watching_;
  base::Fiber* worker_ = nullptr;
  bool worker_asleep_ = false;
  bool watcher_runs_ = false;
  bool stopping_ = false;
  bool armed_ = false;  // the driver will notify us of its next request
  bool reported_ = false;
  bool progressed_ = false;             // since we last waited
  base::Clock::time_point idle_since_;  // when the last progress was made

  std::atomic<uint32_t> in_flight_{0};
  std::atomic<uint16_t> ring_position_{0};
  std::atomic<bool> broken_{false};
  Counter requests_, merged_, notified_, interrupts_, failed_, polled_;
};

}  // namespace minivmm::virtio
