// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/free_runs.h"

#include <algorithm>

namespace minivmm::block::qcow2 {

void FreeRuns::add(uint64_t first, uint64_t count) {
  if (count == 0) return;
  uint64_t end = first + count;
  auto it = runs_.upper_bound(first);
  if (it != runs_.begin() && std::prev(it)->second >= first) --it;
  while (it != runs_.end() && it->first <= end) {
    first = std::min(first, it->first);
    end = std::max(end, it->second);
    clusters_ -= it->second - it->first;
    it = runs_.erase(it);
  }
  runs_.emplace(first, end);
  clusters_ += end - first;
}

std::optional<ClusterRun> FreeRuns::take(uint64_t max, uint64_t border) {
  if (runs_.empty() || max == 0) return std::nullopt;
  const auto it = runs_.begin();
  const uint64_t first = it->first;
  const uint64_t run_end = it->second;
  uint64_t end = run_end - first > max ? first + max : run_end;
  if (first < border) end = std::min(end, border);
  clusters_ -= end - first;
  auto node = runs_.extract(it);
  if (end < run_end) {
    node.key() = end;
    runs_.insert(std::move(node));
  }
  return ClusterRun{first, end - first};
}

std::optional<uint64_t> FreeRuns::forget_above(size_t most) {
  std::optional<uint64_t> out;
  while (runs_.size() > most) {
    const auto last = std::prev(runs_.end());
    out = last->first;
    clusters_ -= last->second - last->first;
    runs_.erase(last);
  }
  return out;
}

}  // namespace minivmm::block::qcow2
