// SPDX-License-Identifier: Apache-2.0
// Decides how long a queue looks for new requests before it sleeps. Pure; one thread.
//
// Waking a sleeping thread costs tens of microseconds, a look at the ring almost nothing: if the
// next request usually comes within the limit, looking is cheaper than sleeping. The window opens
// when a sleep turned out shorter than the limit and closes when it turned out longer, so that a
// guest that is idle or slow costs nothing.
//
// Looking is harmful where the guest needs the very processor we look on. That shows in a look that
// takes long; then the window stays shut for a while, longer each time.
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
    if (shut_for_ != 0) {
      --shut_for_;
    } else if (idle <= limit_) {
      window_ = std::min(limit_, std::max(window_ * 2, kSmallest));
    } else {
      shrink();
    }
  }

  // Looking found a request.
  void found() noexcept { penalty_ = std::max(penalty_ / 2, kSmallestPenalty); }

  // One look took this long, the rest of the loop's work included.
  void looked(Duration took) noexcept {
    if (took < kLongLook) return;
    window_ = Duration(0);
    shut_for_ = penalty_;
    penalty_ = std::min(penalty_ * 2, kLargestPenalty);
  }

 private:
  static constexpr Duration kSmallest = std::chrono::microseconds(4);
  static constexpr Duration kLongLook = std::chrono::microseconds(15);
  // In sleeps.
  static constexpr unsigned kSmallestPenalty = 64;
  static constexpr unsigned kLargestPenalty = 65536;

  void shrink() noexcept { window_ = window_ / 2 < kSmallest ? Duration(0) : window_ / 2; }

  const Duration limit_;
  Duration window_{0};
  unsigned shut_for_ = 0;
  unsigned penalty_ = kSmallestPenalty;
};

}  // namespace minivmm::virtio
