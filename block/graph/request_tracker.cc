// SPDX-License-Identifier: Apache-2.0
#include "block/graph/request_tracker.h"

namespace minivmm::block {

RequestTracker::Range::Range(RequestTracker& tracker, uint64_t offset, uint64_t length,
                             bool exclusive)
    : tracker_(tracker), offset_(offset), end_(offset + length), exclusive_(exclusive) {
  std::unique_lock lock(tracker_.mutex_);
  prev_ = tracker_.tail_;
  (prev_ != nullptr ? prev_->next_ : tracker_.head_) = this;
  tracker_.tail_ = this;
  // Only earlier arrivals block us, so two that wait never wait for each other.
  while (tracker_.blocked(*this)) tracker_.waiters_.wait(lock, "an overlapping request");
}

RequestTracker::Range::~Range() {
  const std::lock_guard lock(tracker_.mutex_);
  (prev_ != nullptr ? prev_->next_ : tracker_.head_) = next_;
  (next_ != nullptr ? next_->prev_ : tracker_.tail_) = prev_;
  tracker_.waiters_.notify_all();
}

bool RequestTracker::Range::conflicts_with(const Range& other) const noexcept {
  return (exclusive_ || other.exclusive_) && offset_ < other.end_ && other.offset_ < end_;
}

bool RequestTracker::blocked(const Range& range) const noexcept {
  for (const Range* r = range.prev_; r != nullptr; r = r->prev_) {
    if (range.conflicts_with(*r)) return true;
  }
  return false;
}

}  // namespace minivmm::block
