// SPDX-License-Identifier: Apache-2.0
// The condition variable of fibers, and what every other primitive of sync.h is made of.
//
// Guarded by a plain std::mutex of its user, which is only ever held for a few instructions and
// never across a suspension: that makes it usable by fibers of different loops at once. Only
// fibers may wait; any thread may notify.
#pragma once

#include <chrono>
#include <mutex>
#include <optional>

#include "base/timer_queue.h"

namespace minivmm::base {

class Fiber;

class WaitQueue {
 public:
  WaitQueue() = default;
  WaitQueue(const WaitQueue&) = delete;
  WaitQueue& operator=(const WaitQueue&) = delete;

  // Unlocks, suspends until notified, locks again. `why` is a literal for state dumps. As with any
  // condition variable the caller re-checks its condition.
  void wait(std::unique_lock<std::mutex>& lock, const char* why);
  // The same with a deadline; returns false if the deadline passed without a notification.
  bool wait_until(std::unique_lock<std::mutex>& lock, Clock::time_point deadline, const char* why);

  // The mutex must be held.
  void notify_one() noexcept;
  void notify_all() noexcept;
  bool empty() const noexcept { return head_ == nullptr; }

 private:
  struct Waiter;
  void link(Waiter& waiter) noexcept;
  void unlink(Waiter& waiter) noexcept;
  Waiter* head_ = nullptr;
  Waiter* tail_ = nullptr;
};

}  // namespace minivmm::base
