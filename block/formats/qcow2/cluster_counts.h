// SPDX-License-Identifier: Apache-2.0
// How often each host cluster is referred to, as a check counts it. A byte a cluster in chunks that
// exist where something was counted, so memory follows the metadata and not the size of a sparse
// file; the few counts above 254 are kept aside. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

namespace minivmm::block::qcow2 {

class ClusterCounts {
 public:
  // Returns the count before. Nearly all are in the chunk of the last call, and small: a check
  // spends its time here.
  uint64_t add(uint64_t cluster, uint64_t times = 1) {
    if (times == 1 && cluster / kChunk == last_number_) {
      uint8_t& count = last_[cluster % kChunk];
      if (count < kElsewhere - 1) return count++;
    }
    return add_slowly(cluster, times);
  }
  uint64_t get(uint64_t cluster) const {
    if (cluster / kChunk == last_number_) {
      const uint8_t count = last_[cluster % kChunk];
      if (count != kElsewhere) return count;
    }
    return get_slowly(cluster);
  }
  // The first clusters of all chunks that exist, ascending.
  static constexpr uint64_t kChunk = 256;
  std::vector<uint64_t> chunks() const;

 private:
  static constexpr uint8_t kElsewhere = 255;
  using Chunk = std::unique_ptr<uint8_t[]>;
  uint64_t add_slowly(uint64_t cluster, uint64_t times);
  uint64_t get_slowly(uint64_t cluster) const;
  uint8_t* chunk(uint64_t number);

  std::unordered_map<uint64_t, Chunk> chunks_;
  std::unordered_map<uint64_t, uint64_t> large_;
  // Of the last call.
  mutable uint64_t last_number_ = ~uint64_t{0};
  mutable uint8_t* last_ = nullptr;
};

}  // namespace minivmm::block::qcow2
