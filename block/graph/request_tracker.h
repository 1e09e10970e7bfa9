// SPDX-License-Identifier: Apache-2.0
// Ranges of a node that are being changed: a read-modify-write excludes every overlapping write,
// zero and discard, from whatever edge and loop. Plain writes do not exclude each other.
#pragma once

#include <cstdint>
#include <mutex>

#include "base/wait_queue.h"

namespace minivmm::block {

class RequestTracker {
 public:
  // Held while a request changes [offset, offset + length). Fiber.
  class Range {
   public:
    // Waits until no exclusive range overlaps and, for an exclusive one, no range at all does.
    Range(RequestTracker& tracker, uint64_t offset, uint64_t length, bool exclusive);
    ~Range();
    Range(const Range&) = delete;
    Range& operator=(const Range&) = delete;

   private:
    friend class RequestTracker;
    bool conflicts_with(const Range& other) const noexcept;
    RequestTracker& tracker_;
    const uint64_t offset_;
    const uint64_t end_;
    const bool exclusive_;
    Range* prev_ = nullptr;
    Range* next_ = nullptr;
  };

 private:
  bool blocked(const Range& range) const noexcept;
  std::mutex mutex_;
  base::WaitQueue waiters_;
  Range* head_ = nullptr;  // in order of arrival; earlier ones go first
  Range* tail_ = nullptr;
};

}  // namespace minivmm::block
