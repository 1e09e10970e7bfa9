// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/extent_cursor.h"

#include <algorithm>
#include <mutex>

#include "base/checked.h"

namespace minivmm::block {

namespace {

// Holes are dealt out in pieces of at most this, so that a job can be stopped among them.
constexpr uint64_t kLongestHole = uint64_t{4} << 30;

}  // namespace

// The extent at position_, which is a multiple of align_.
SourceExtent ExtentCursor::aligned_extent() {
  const uint64_t end = source_.size();
  SourceExtent found = source_.extent(position_, end - position_);
  if (align_ == 1) return found;
  const uint64_t stop = position_ + found.length;
  if (stop == end || stop % align_ == 0) return found;
  // Ends inside an aligned block: a hole is cut before it, and the block is taken as data.
  const uint64_t down = base::align_down(stop, align_);
  if (found.kind != ExtentKind::kData && down > position_) {
    found.length = down - position_;
    return found;
  }
  found.kind = ExtentKind::kData;
  found.length = std::min(base::align_up(stop, align_), end) - position_;
  return found;
}

void ExtentCursor::append(Batch& out, SourceExtent extent) {
  out.length += extent.length;
  if (extent.kind == ExtentKind::kData) out.data_bytes += extent.length;
  if (!out.extents.empty() && out.extents.back().kind == extent.kind) {
    out.extents.back().length += extent.length;
  } else {
    out.extents.push_back(extent);
  }
}

bool ExtentCursor::next(Batch& out) {
  const std::lock_guard lock(mutex_);
  const uint64_t end = source_.size();
  out = {};
  out.offset = position_;
  // Batches end at multiples of their size, so that large requests are aligned ones.
  const uint64_t stop = std::min(base::align_down(position_, batch_) + batch_, end);
  while (position_ < end) {
    if (ahead_.length == 0) ahead_ = aligned_extent();
    const bool hole = ahead_.kind != ExtentKind::kData;
    const bool long_hole = hole && position_ + ahead_.length > stop;
    if (long_hole && !out.extents.empty()) return true;
    const uint64_t most = long_hole ? kLongestHole : stop - position_;
    if (most == 0) return true;
    SourceExtent piece{position_, std::min(ahead_.length, most), ahead_.kind};
    ahead_.length -= piece.length;
    position_ += piece.length;
    append(out, piece);
    if (long_hole || position_ >= stop) return true;
  }
  return !out.extents.empty();
}

uint64_t count_data(CopySource& source) {
  uint64_t bytes = 0;
  const uint64_t end = source.size();
  for (uint64_t at = 0; at < end;) {
    const SourceExtent extent = source.extent(at, end - at);
    if (extent.kind == ExtentKind::kData) bytes += extent.length;
    at += extent.length;
  }
  return bytes;
}

}  // namespace minivmm::block
