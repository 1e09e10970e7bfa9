// SPDX-License-Identifier: Apache-2.0
// Decides how long a queue looks for new requests before it sleeps. Pure; one thread.
//
// Waking a sleeping thread costs tens of microseconds, a look at the ring almost nothing: if the
// next request usually comes within the limit, looking is cheaper than sleeping. The window opens
// when a sleep turned out shorter than the limit and closes when it turned out longer, so that a
// guest that is idle or slow costs nothing.
#pragma once

#include <algorithm>
#include <chrono>

namespace minivmm::virtio {

class QueuePoller {
 public:
  using Duration = std::chrono::nanoseconds;

  explicit QueuePoller(Duration limit) noexcept : limit_(limit) {}

  // How long to look now; zero: not at all.
  Duration window() const noexcept { return window_; }

  // A request came `idle` after the queue had run empty, and woke us.
  void slept(Duration idle) noexcept {
    if (idle <= limit_) {
      window_ = std::min(limit_, std::max(window_ * 2, kSmallest));
    } else {
      window_ = window_ / 2 < kSmallest ? Duration(0) : window_ / 2;
    }
  }

 private:
  static constexpr Duration kSmallest = std::chrono::microseconds(4);
  const Duration limit_;
  Duration window_{0};
};

}  // namespace minivmm::virtio
