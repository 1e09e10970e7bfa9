// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/allocator.h"

#include <algorithm>
#include <cerrno>
#include <exception>
#include <vector>

#include <fmt/core.h>

#include "base/log.h"

namespace minivmm::block::qcow2 {

Allocator::Allocator(ImageFile& image, Refcounts& refcounts, MetadataMap& map)
    : image_(image), refcounts_(refcounts), map_(map) {}

Allocator::Run Allocator::take_listed(uint64_t max) {
  const unsigned bits = image_.geometry().cluster_bits;
  const std::lock_guard lock(mutex_);
  const auto run = runs_.take(max, high_water_);
  if (!run) return {};
  Run out{run->first << bits, run->count, false};
  out.fresh = run->first >= high_water_ && out.offset >= image_.size();
  high_water_ = std::max(high_water_, run->first + run->count);
  return out;
}

Allocator::Run Allocator::allocate(uint64_t max) {
  const unsigned bits = image_.geometry().cluster_bits;
  for (;;) {
    Run run = take_listed(max);
    if (run.clusters == 0) {
      refill();
      continue;
    }
    const uint64_t first = run.offset >> bits;
    // A cluster of metadata with refcount 0 means that the refcounts are wrong.
    if (const char* what = map_.find(first, run.clusters)) {
      throw image_.corruption(
          fmt::format("a cluster at or after {:#x} has refcount 0 and is part "
                      "of the {}",
                      run.offset, what));
    }
    uint64_t taken = 0;
    try {
      taken = refcounts_.take_free(first, run.clusters);
    } catch (...) {
      add_free(first, run.clusters);
      throw;
    }
    if (taken + 1 < run.clusters) add_free(first + taken + 1, run.clusters - taken - 1);
    if (taken == 0) continue;
    run.clusters = taken;
    return run;
  }
}

uint64_t Allocator::allocate_together(uint64_t count) {
  constexpr size_t kMostTries = 4096;
  std::vector<Run> too_short;
  uint64_t out = 0;
  std::exception_ptr error;
  try {
    while (out == 0 && too_short.size() < kMostTries) {
      const Run run = allocate(count);
      if (run.clusters == count) {
        out = run.offset;
      } else {
        too_short.push_back(run);
      }
    }
    if (out == 0) out = allocate_behind(count);
  } catch (...) {
    error = std::current_exception();
  }
  for (const Run& run : too_short) give_back(run.offset, run.clusters);
  if (error) std::rethrow_exception(error);
  return out;
}

uint64_t Allocator::allocate_behind(uint64_t count) {
  const std::lock_guard refilling(refilling_);
  FreeRuns found;
  const uint64_t first = refcounts_.make_area(count, found);
  while (const auto run = found.take(~uint64_t{0}, 0)) add_free(run->first, run->count);
  return first << image_.geometry().cluster_bits;
}

void Allocator::refill() {
  const std::lock_guard refilling(refilling_);
  uint64_t index = 0;
  {
    const std::lock_guard lock(mutex_);
    if (!runs_.empty()) return;  // somebody refilled while this fiber waited
    index = next_block_;
  }
  FreeRuns found;
  if (index < refcounts_.table_entries()) {
    {
      // Before the search: what is freed from now on is added by add_free, at worst twice.
      const std::lock_guard lock(mutex_);
      next_block_ = index + 1;
    }
    try {
      refcounts_.find_free(index, found);
    } catch (...) {
      const std::lock_guard lock(mutex_);
      next_block_ = std::min(next_block_, index);
      throw;
    }
  } else {
    const uint64_t next = refcounts_.grow_table(found);
    const std::lock_guard lock(mutex_);
    // Lower: the list was cut meanwhile, and from there on there is something to be found.
    if (next_block_ == index) next_block_ = next;
  }
  const std::lock_guard lock(mutex_);
  while (const auto run = found.take(~uint64_t{0}, 0)) runs_.add(run->first, run->count);
}

void Allocator::give_back(uint64_t offset, uint64_t clusters) noexcept {
  const uint64_t first = offset >> image_.geometry().cluster_bits;
  try {
    refcounts_.free_run(first, clusters);
    add_free(first, clusters);
  } catch (const std::exception& e) {
    base::log_warning("{}: {} clusters at {:#x} are lost until the image is repaired: {}",
                      image_.name(), clusters, offset, e.what());
  }
}

void Allocator::add_free(uint64_t first, uint64_t count) {
  const unsigned block_bits = image_.geometry().block_bits();
  const std::lock_guard lock(mutex_);
  // What lies in blocks that have not been searched will be found there.
  const uint64_t end = std::min(first + count, next_block_ << block_bits);
  if (first >= end) return;
  runs_.add(first, end - first);
  if (runs_.runs() <= kMostRuns) return;
  if (const auto forgotten = runs_.forget_above(kMostRuns / 2)) {
    next_block_ = std::min(next_block_, *forgotten >> block_bits);
  }
}

size_t Allocator::listed_runs() const {
  const std::lock_guard lock(mutex_);
  return runs_.runs();
}

}  // namespace minivmm::block::qcow2
