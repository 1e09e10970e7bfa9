// SPDX-License-Identifier: Apache-2.0
#include "base/idle_spin.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace minivmm::base {
namespace {

std::atomic<unsigned> g_spinning{0};

unsigned most_spinning() noexcept {
  static const unsigned most = std::max(1U, std::thread::hardware_concurrency()) - 1;
  return most;
}

}  // namespace

bool IdleSpin::begin(Clock::time_point now) noexcept {
  if (credit_ <= 0 || limit_.count() == 0 || now < pause_end_) return false;
  if (g_spinning.fetch_add(1, std::memory_order_relaxed) < most_spinning()) return true;
  g_spinning.fetch_sub(1, std::memory_order_relaxed);
  return false;
}

void IdleSpin::spun(bool found_work) noexcept {
  g_spinning.fetch_sub(1, std::memory_order_relaxed);
  credit_ = found_work ? std::min(credit_ + 1, kMaxCredit) : credit_ - 2;
}

void IdleSpin::gave_way(Clock::time_point begin, Clock::time_point end) noexcept {
  if (end - begin < kTimeSlice) return;
  const bool again = begin < pause_end_ + 2 * pause_;
  pause_ = again ? std::min<Clock::duration>(2 * pause_, kLongestPause) : kShortestPause;
  pause_end_ = end + pause_;
}

void IdleSpin::slept(std::chrono::nanoseconds time) noexcept {
  // Twice the limit: half of such a sleep was the wake itself.
  if (time < 2 * limit_) credit_ = std::min(std::max(credit_, 0) + 4, kMaxCredit);
}

}  // namespace minivmm::base
