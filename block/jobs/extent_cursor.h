// SPDX-License-Identifier: Apache-2.0
// Deals the extents of a source out to the workers of a job, in order, in batches of about one
// request's data. Long holes are one batch, however long.
//
// Owned by the job. next() runs on fibers of any loop; one at a time asks the source.
#pragma once

#include <cstdint>
#include <vector>

#include "base/sync.h"
#include "block/jobs/copy_source.h"

namespace minivmm::block {

struct Batch {
  uint64_t offset = 0;
  uint64_t length = 0;
  uint64_t data_bytes = 0;
  // In order, without gaps. Neighbours differ in kind, except for kinds that are all data.
  std::vector<SourceExtent> extents;
};

class ExtentCursor {
 public:
  // `batch` bytes: a power of two. `align`, a power of two of at most `batch`: where it is more
  // than 1 every extent begins and ends at its multiples (but for the end of the source), and one
  // that holds any data is data as a whole.
  ExtentCursor(CopySource& source, uint64_t batch, uint64_t align = 1) noexcept
      : source_(source), batch_(batch), align_(align) {}

  // False: there is no more. Throws what the source throws; the cursor then stays where it is.
  bool next(Batch& out);

 private:
  SourceExtent aligned_extent();
  static void append(Batch& out, SourceExtent extent);

  CopySource& source_;
  const uint64_t batch_;
  const uint64_t align_;
  base::FiberMutex mutex_;
  uint64_t position_ = 0;  // guarded by mutex_
  SourceExtent ahead_{};   // known, not dealt out; guarded by mutex_
};

// How many bytes of the source are data. Fiber.
uint64_t count_data(CopySource& source);

}  // namespace minivmm::block
