// SPDX-License-Identifier: Apache-2.0
// Gives out free host clusters. Free ones are found by reading refcount blocks one at a time, from
// the start of the image, when the list in memory has run out; past the last block new blocks are
// made, which is how the file grows. The size of the host file says nothing about what is free.
//
// Owned by Image. Any loop, on fibers. The list is a hint; a cluster is taken by its refcount going
// from 0 to 1, so that it cannot be given out twice. A guest that discards every second cluster of
// a large disk makes a long list: past kMostRuns its higher half is forgotten, to be found again by
// reading those blocks when it is needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "base/sync.h"
#include "block/formats/qcow2/free_runs.h"
#include "block/formats/qcow2/refcounts.h"

namespace minivmm::block::qcow2 {

class Allocator {
 public:
  Allocator(ImageFile& image, Refcounts& refcounts, MetadataMap& map);

  struct Run {
    uint64_t offset = 0;  // bytes in the host file
    uint64_t clusters = 0;
    bool fresh = false;  // past the end of the file and never used: reads as zeroes
  };
  // 1 to `max` adjacent clusters with refcount 1. Throws ENOSPC and such with nothing taken.
  Run allocate(uint64_t max);
  // Exactly `count` adjacent clusters, for a table. Where free runs are too short they lie behind
  // all others, which leaves a hole in the file.
  uint64_t allocate_together(uint64_t count);
  // Takes back what allocate gave and nothing points to, in memory or on disk.
  void give_back(uint64_t offset, uint64_t clusters) noexcept;
  // Clusters whose refcount has become 0 and that no request knows.
  void add_free(uint64_t first, uint64_t count);

  static constexpr size_t kMostRuns = 16384;
  // For tests and state dumps.
  size_t listed_runs() const;

 private:
  void refill();
  uint64_t allocate_behind(uint64_t count);
  Run take_listed(uint64_t max);

  ImageFile& image_;
  Refcounts& refcounts_;
  MetadataMap& map_;
  base::FiberMutex refilling_;
  mutable std::mutex mutex_;
  FreeRuns runs_;            // guarded by mutex_
  uint64_t next_block_ = 0;  // guarded by mutex_: blocks below it have been searched
  uint64_t high_water_ = 0;  // guarded by mutex_: clusters from here on were never given out
};

}  // namespace minivmm::block::qcow2
