// SPDX-License-Identifier: Apache-2.0
// Tells whether a kind of system call may be made on the loop's own thread. One that blocked there
// sends those after it elsewhere for a while. Any thread.
//
// A call can also take long because other threads had the CPU, and sending calls elsewhere makes
// that worse. So after a first long one those that follow are looked at more closely for a while:
// only if the thread went to sleep in a long one did it wait for a device.
#pragma once

#include <sys/resource.h>

#include <atomic>
#include <chrono>
#include <cstdint>

#include "base/timer_queue.h"

namespace minivmm::block {

class Breaker {
 public:
  bool allows_inline() const noexcept {
    const int64_t until = open_until_.load(std::memory_order_relaxed);
    return until == 0 || now() >= until;
  }

  // An inline call is made while it lives.
  class Call {
   public:
    explicit Call(Breaker& breaker) noexcept
        : breaker_(breaker),
          begin_(now()),
          sleeps_(begin_ < breaker.suspicious_until_.load(std::memory_order_relaxed) ? sleeps()
                                                                                     : -1) {}
    ~Call() {
      const int64_t end = now();
      if (end - begin_ > kLong) breaker_.was_long(end, sleeps_ >= 0 && sleeps() != sleeps_);
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    Breaker& breaker_;
    const int64_t begin_;
    const int64_t sleeps_;
  };

 private:
  // A call that took this long waited for more than memory.
  static constexpr int64_t kLong = 20'000'000;
  static constexpr int64_t kBackOff = 200'000'000;
  static constexpr int64_t kSuspicion = 2'000'000'000;

  // Steady clock, nanoseconds.
  static int64_t now() noexcept {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               base::Clock::now().time_since_epoch())
        .count();
  }
  // How often this thread gave up the CPU by itself.
  static int64_t sleeps() noexcept {
    rusage usage{};
    return ::getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nvcsw : 0;
  }
  void was_long(int64_t end, bool slept) noexcept {
    if (slept) open_until_.store(end + kBackOff, std::memory_order_relaxed);
    suspicious_until_.store(end + kSuspicion, std::memory_order_relaxed);
  }

  std::atomic<int64_t> open_until_{0};
  std::atomic<int64_t> suspicious_until_{0};
};

}  // namespace minivmm::block
