// SPDX-License-Identifier: Apache-2.0
// Timers of one loop: a binary heap of borrowed Timer objects. The loop's thread only.
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <vector>

namespace minivmm::base {

using Clock = std::chrono::steady_clock;

// Lives with whoever waits (a fiber's stack). Must not be destroyed while armed.
class Timer {
 public:
  using Callback = void (*)(void* argument) noexcept;
  Timer(Callback callback, void* argument) noexcept : callback_(callback), argument_(argument) {}
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  bool armed() const noexcept { return slot_ != kNone; }

 private:
  friend class TimerQueue;
  static constexpr size_t kNone = ~size_t{0};
  Callback callback_;
  void* argument_;
  Clock::time_point deadline_;
  size_t slot_ = kNone;
};

class TimerQueue {
 public:
  void arm(Timer& timer, Clock::time_point deadline);
  // Does nothing if the timer is not armed (it has fired already).
  void disarm(Timer& timer) noexcept;

  std::optional<Clock::time_point> next_deadline() const noexcept;
  // Fires what is due. Callbacks may arm and disarm timers. Returns how many fired.
  size_t fire_due(Clock::time_point now) noexcept;

 private:
  void place(size_t slot, Timer* timer) noexcept;
  void sift_up(size_t slot) noexcept;
  void sift_down(size_t slot) noexcept;
  void remove(size_t slot) noexcept;

  std::vector<Timer*> heap_;
};

}  // namespace minivmm::base
