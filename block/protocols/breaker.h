// SPDX-License-Identifier: Apache-2.0
// Tells whether a kind of system call may be made on the loop's own thread. One that blocked there
// sends those after it elsewhere for a while. Any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include "base/timer_queue.h"

namespace minivmm::block {

class Breaker {
 public:
  // Steady clock, nanoseconds.
  static int64_t now() noexcept {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               base::Clock::now().time_since_epoch())
        .count();
  }

  bool allows_inline() const noexcept {
    const int64_t until = open_until_.load(std::memory_order_relaxed);
    return until == 0 || now() >= until;
  }

  // An inline call that began at `begin` has ended.
  void ended(int64_t begin) noexcept {
    const int64_t end = now();
    if (end - begin > kBlocked) open_until_.store(end + kBackOff, std::memory_order_relaxed);
  }

 private:
  // A call that took this long waited for more than memory. It is several times what losing the CPU
  // to another thread takes: that is no reason.
  static constexpr int64_t kBlocked = 20'000'000;
  static constexpr int64_t kBackOff = 200'000'000;

  std::atomic<int64_t> open_until_{0};
};

}  // namespace minivmm::block
