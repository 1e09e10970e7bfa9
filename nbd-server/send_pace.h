// SPDX-License-Identifier: Apache-2.0
// How many replies of a session gather for one send while more requests wait. Part of a Session;
// its loop only.
//
// One send for all that was received makes client and server take turns: half of what the client
// has outstanding is the most (measured with 4 KiB: at depth 8 four are a quarter faster than
// eight, at depth 16 eight a quarter faster than sixteen). But a client that waits is woken by each
// send, which costs as much as two small requests: below that, more is better (at depth 32 and more
// reads are 11 to 24 percent faster with sixteen than with eight, writes 16 to 32).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace minivmm::nbd {

class SendPace {
 public:
  static constexpr size_t kLeast = 2;
  static constexpr size_t kMost = 16;  // more win nothing

  size_t replies() const noexcept { return std::clamp(depth_ / 2, kLeast, kMost); }

  // So many replies leave together.
  void sends(size_t replies) noexcept { sent_ = replies; }
  // The next receive begins; `requests` were taken so far in all. How many since the last one?
  size_t receives(uint64_t requests) noexcept {
    const auto taken = static_cast<size_t>(requests - requests_);
    depth_ = std::max(depth_ - (depth_ + 7) / 8, taken + unread_);
    requests_ = requests;
    unread_ = std::exchange(sent_, 0);
    return taken;
  }
  // Nothing is there yet: the client has read what was sent.
  void waits() noexcept { unread_ = 0; }

 private:
  // What the client has outstanding at least: the requests of one receive, and the replies that
  // left right before it, of which it cannot have made new requests. Falls slowly.
  size_t depth_ = 0;
  uint64_t requests_ = 0;  // at the last receive
  size_t unread_ = 0;      // replies that left right before it
  size_t sent_ = 0;        // replies in the last send since
};

}  // namespace minivmm::nbd
