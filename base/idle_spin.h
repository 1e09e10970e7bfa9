// SPDX-License-Identifier: Apache-2.0
// Decides whether a loop with nothing to do looks around for a moment before it sleeps.
//
// Waking a sleeping CPU was measured to cost 17 to 24 us, ten times a 4 KiB request; a client that
// sends one request after the other pays that each time. So a loop whose recent sleeps were short
// spins up to its limit first. It stops doing so when spinning does not pay, and at least one CPU
// is always left to others.
//
// It also stops for a while when the CPUs are busy with somebody else's work. A spinning loop that
// gives way to such a neighbour waits for the whole of its time slice, some milliseconds, and that
// at every batch of requests; one that sleeps gets a CPU as soon as it is woken. Owned by a loop,
// used on its thread.
#pragma once

#include <chrono>

namespace minivmm::base {

class IdleSpin {
 public:
  using Clock = std::chrono::steady_clock;

  explicit IdleSpin(std::chrono::nanoseconds limit) noexcept : limit_(limit) {}

  // True: spin now, for at most limit(). Then tell the outcome by spun().
  bool begin(Clock::time_point now) noexcept;
  void spun(bool found_work) noexcept;
  // Between begin() and spun(): giving way to others took from `begin` to `end`.
  void gave_way(Clock::time_point begin, Clock::time_point end) noexcept;
  // How long the loop slept.
  void slept(std::chrono::nanoseconds time) noexcept;
  std::chrono::nanoseconds limit() const noexcept { return limit_; }

 private:
  // What short sleeps and successful spins earn, and fruitless spins spend.
  static constexpr int kMaxCredit = 16;
  // A client that had something to do is back before this; a neighbour's time slice is longer.
  static constexpr auto kTimeSlice = std::chrono::milliseconds(1);
  // How long to sleep at once after a neighbour was met, doubled while it is still there.
  static constexpr auto kShortestPause = std::chrono::milliseconds(20);
  static constexpr auto kLongestPause = std::chrono::seconds(1);

  const std::chrono::nanoseconds limit_;
  int credit_ = 0;
  Clock::duration pause_ = Clock::duration::zero();  // the last one
  Clock::time_point pause_end_;
};

}  // namespace minivmm::base
