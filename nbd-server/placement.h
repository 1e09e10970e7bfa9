// SPDX-License-Identifier: Apache-2.0
// Which loop serves a connection: the one that it came to (home), or one that it shares with
// others of its kind.
//
// A client that sends one small request after the other keeps a loop looking for work
// (base/idle_spin.h), which takes a processor though it serves little. Two such clients on two
// loops leave none of two processors to the clients themselves; on one loop they were measured to
// get half as much again. Who has more outstanding gains by a loop of its own and goes back, as
// does one that finds the shared loop with more to do than it can.
//
// Used by the session, on the loop that it is on.
#pragma once

#include <chrono>

#include "base/event_loop.h"

namespace minivmm::nbd {

class Placement {
 public:
  using Clock = base::Clock;

  // So many requests in a row make a client one of those that share; what is not like that counts
  // as much as kSetback that are.
  static constexpr unsigned kEnough = 256;
  static constexpr unsigned kSetback = 16;
  // A loop that has had no idle moment for so long has too much to do.
  static constexpr auto kSaturated = std::chrono::milliseconds(50);
  // Who left such a loop comes back after this, doubled each time.
  static constexpr auto kShortestStay = std::chrono::seconds(1);
  static constexpr auto kLongestStay = std::chrono::seconds(64);

  // `shared` may be nullptr: then it stays at home.
  Placement(base::EventLoop& home, base::EventLoop* shared) noexcept
      : home_(home), shared_(shared == &home ? nullptr : shared) {}

  base::EventLoop& here() const noexcept { return away_ ? *shared_ : home_; }
  bool away() const noexcept { return away_; }

  // Before each receive; `alternating`: the last one brought one request, a small one. True: it is
  // time to decide().
  bool note(bool alternating) noexcept;
  // Whether to move, given when the present loop was idle last.
  bool decide(Clock::time_point now, Clock::time_point last_idle) noexcept;
  void move() noexcept;
  // There is no way to the other loop: never leaves home any more.
  void stay() noexcept;

 private:
  base::EventLoop& home_;
  base::EventLoop* shared_;
  bool away_ = false;
  unsigned score_ = 0;      // up to kEnough
  unsigned unchecked_ = 0;  // notes since the last decision on the shared loop
  Clock::duration pause_{};
  Clock::time_point not_before_{};
};

}  // namespace minivmm::nbd
