// SPDX-License-Identifier: Apache-2.0
// Runs of clusters that are believed to be free. A hint only: the refcounts decide, so a run that
// is added twice or has been taken meanwhile does no harm. Pure; not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

namespace minivmm::block::qcow2 {

struct ClusterRun {
  uint64_t first = 0;
  uint64_t count = 0;
};

class FreeRuns {
 public:
  bool empty() const noexcept { return runs_.empty(); }
  uint64_t clusters() const noexcept { return clusters_; }
  size_t runs() const noexcept { return runs_.size(); }

  // Joins with what it touches or overlaps.
  void add(uint64_t first, uint64_t count);
  // Takes up to `max` clusters, from the lowest run; but not across `border` (a run that begins
  // below it ends there).
  std::optional<ClusterRun> take(uint64_t max, uint64_t border);
  // Forgets the highest runs until at most `most` are left; returns the first cluster of what was
  // forgotten, or nothing.
  std::optional<uint64_t> forget_above(size_t most);

 private:
  std::map<uint64_t, uint64_t> runs_;  // first cluster to end; disjoint, not adjacent
  uint64_t clusters_ = 0;
};

}  // namespace minivmm::block::qcow2
