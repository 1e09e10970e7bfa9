// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/placement.h"

#include <algorithm>

namespace minivmm::nbd {

bool Placement::note(bool alternating) noexcept {
  if (shared_ == nullptr) return false;
  score_ = alternating ? std::min(score_ + 1, kEnough) : score_ - std::min(score_, kSetback);
  if (!away_) return score_ == kEnough;
  return score_ == 0 || ++unchecked_ >= kEnough;
}

bool Placement::decide(Clock::time_point now, Clock::time_point last_idle) noexcept {
  if (!away_) {
    score_ = 0;
    return now >= not_before_;
  }
  unchecked_ = 0;
  if (score_ == 0) return true;
  if (now - last_idle < kSaturated) return false;
  pause_ = std::clamp<Clock::duration>(2 * pause_, kShortestStay, kLongestStay);
  not_before_ = now + pause_;
  return true;
}

void Placement::move() noexcept {
  away_ = !away_;
  score_ = away_ ? kEnough : 0;
  unchecked_ = 0;
}

void Placement::stay() noexcept {
  shared_ = nullptr;
  away_ = false;
}

}  // namespace minivmm::nbd
