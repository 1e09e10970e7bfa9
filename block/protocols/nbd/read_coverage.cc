// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/read_coverage.h"

#include <algorithm>
#include <exception>

namespace minivmm::block {

void ReadCoverage::add(uint64_t offset, uint64_t length) noexcept {
  if (length == 0 || wrong_) return;
  if (offset == next_ && length <= end_ - next_) {
    next_ += length;
    return;
  }
  wrong_ =
      offset < next_ || offset > end_ || length > end_ - offset || pieces_.size() == kMostPieces;
  if (wrong_) return;
  try {
    pieces_.emplace_back(offset, offset + length);
  } catch (const std::exception&) {
    wrong_ = true;
  }
}

bool ReadCoverage::complete() noexcept {
  if (wrong_) return false;
  std::sort(pieces_.begin(), pieces_.end());
  for (const auto& [begin, end] : pieces_) {
    if (begin != next_) return false;
    next_ = end;
  }
  pieces_.clear();
  return next_ == end_;
}

}  // namespace minivmm::block
