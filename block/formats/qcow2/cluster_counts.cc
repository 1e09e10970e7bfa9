// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/cluster_counts.h"

#include <algorithm>
#include <utility>

namespace minivmm::block::qcow2 {

uint8_t* ClusterCounts::chunk(uint64_t number) {
  if (number == last_number_) return last_;
  Chunk& found = chunks_[number];
  if (!found) found = std::make_unique<uint8_t[]>(kChunk);
  last_number_ = number;
  last_ = found.get();
  return last_;
}

uint64_t ClusterCounts::add_slowly(uint64_t cluster, uint64_t times) {
  uint8_t& count = chunk(cluster / kChunk)[cluster % kChunk];
  if (count == kElsewhere) return std::exchange(large_[cluster], large_[cluster] + times);
  const uint64_t before = count;
  if (times < kElsewhere - before) {
    count = static_cast<uint8_t>(before + times);
  } else {
    count = kElsewhere;
    large_[cluster] = before + times;
  }
  return before;
}

uint64_t ClusterCounts::get_slowly(uint64_t cluster) const {
  const auto it = chunks_.find(cluster / kChunk);
  if (it == chunks_.end()) return 0;
  last_number_ = cluster / kChunk;
  last_ = it->second.get();
  const uint8_t count = it->second[cluster % kChunk];
  return count == kElsewhere ? large_.at(cluster) : count;
}

std::vector<uint64_t> ClusterCounts::chunks() const {
  std::vector<uint64_t> out;
  out.reserve(chunks_.size());
  for (const auto& [number, chunk] : chunks_) out.push_back(number * kChunk);
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace minivmm::block::qcow2
