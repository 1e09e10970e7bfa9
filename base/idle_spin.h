// SPDX-License-Identifier: Apache-2.0
// Decides whether a loop with nothing to do looks around for a moment before it sleeps.
//
// Waking a sleeping CPU was measured to cost 17 to 24 us, ten times a 4 KiB request; a client that
// sends one request after the other pays that each time. So a loop whose recent sleeps were short
// spins up to its limit first. It stops doing so when spinning does not pay, and at least one CPU
// is always left to others. Owned by a loop, used on its thread.
#pragma once

#include <chrono>

namespace minivmm::base {

class IdleSpin {
 public:
  explicit IdleSpin(std::chrono::nanoseconds limit) noexcept : limit_(limit) {}

  // True: spin now, for at most limit(). Then tell the outcome by spun().
  bool begin() noexcept;
  void spun(bool found_work) noexcept;
  // How long the loop slept.
  void slept(std::chrono::nanoseconds time) noexcept;
  std::chrono::nanoseconds limit() const noexcept { return limit_; }

 private:
  // What short sleeps and successful spins earn, and fruitless spins spend.
  static constexpr int kMaxCredit = 16;
  const std::chrono::nanoseconds limit_;
  int credit_ = 0;
};

}  // namespace minivmm::base
