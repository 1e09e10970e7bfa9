// SPDX-License-Identifier: Apache-2.0
// Where the image's metadata lies, so that no data, and no metadata of another kind, is ever
// written over it: the last defence against a damaged or hostile image (an L2 entry that points at
// the L1 table, a refcount of 0 for a cluster in use, two tables in one place).
//
// Owned by Image. Any loop. The question "may data go here?" is a few comparisons and one bit test
// in the common case.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "block/formats/qcow2/header.h"

namespace minivmm::block::qcow2 {

// What the map calls things: compared by address.
inline constexpr char kHeader[] = "header";
inline constexpr char kLuksHeader[] = "LUKS header";
inline constexpr char kL1Table[] = "L1 table";
inline constexpr char kL2Table[] = "L2 table";
inline constexpr char kRefcountTable[] = "refcount table";
inline constexpr char kRefcountBlock[] = "refcount block";
inline constexpr char kSnapshotTable[] = "snapshot table";
inline constexpr char kSnapshotL1[] = "L1 table of a snapshot";
inline constexpr char kBitmapDirectory[] = "directory of the bitmaps";
inline constexpr char kBitmapTable[] = "table of a bitmap";

class MetadataMap {
 public:
  explicit MetadataMap(const Header& header);

  // `what` is one of the names above.
  void add(uint64_t cluster, const char* what);
  // Returns whether it was there.
  bool remove(uint64_t cluster);
  // Tables of snapshots and bitmaps. Of more than kMostBeside clusters in all, and of tables that
  // overlap others, which only a strange image has, the rest is not known here.
  void add_beside(uint64_t first, uint64_t count, const char* what);
  // What is called otherwise stays.
  void remove_beside(uint64_t first, uint64_t count);
  static constexpr uint64_t kMostBeside = 1 << 16;
  void move_refcount_table(uint64_t first_cluster, uint64_t clusters);
  void move_l1_table(uint64_t first_cluster, uint64_t clusters);
  void move_snapshot_table(uint64_t first_cluster, uint64_t clusters);

  // What metadata lies in [first, first + count), or nullptr. Clusters, not bytes. What is called
  // `except` does not count.
  const char* find(uint64_t first, uint64_t count, const char* except = nullptr) const;

 private:
  // A run of clusters in one word: it moves while writers ask, and a mixture of two places would
  // take guest data for metadata. 47 bits of cluster number, 17 of clusters.
  class Place {
   public:
    void set(uint64_t first, uint64_t clusters) noexcept;
    bool touches(uint64_t first, uint64_t end) const noexcept;

   private:
    static constexpr unsigned kCountBits = 17;
    std::atomic<uint64_t> word_{0};
  };
  // A bit of the filter, of 2^filter_bits_.
  size_t filter_bit(uint64_t cluster) const noexcept {
    return static_cast<size_t>((cluster * 0x9e3779b97f4a7c15ULL) >> (64 - filter_bits_));
  }
  bool may_contain(uint64_t cluster) const noexcept {
    const size_t bit = filter_bit(cluster);
    return ((filter_[bit / 64].load(std::memory_order_relaxed) >> (bit % 64)) & 1) != 0;
  }

  Place luks_;
  Place snapshots_;
  Place l1_;
  std::atomic<uint64_t> table_first_;
  std::atomic<uint64_t> table_end_;
  // A Bloom filter in front of the exact set: most questions end here, without a lock. Its size
  // follows the number of L2 tables that there can be.
  const unsigned filter_bits_;
  std::unique_ptr<std::atomic<uint64_t>[]> filter_;
  mutable std::mutex mutex_;
  std::unordered_map<uint64_t, const char*> clusters_;  // guarded by mutex_
  uint64_t beside_ = 0;                                 // guarded by mutex_: of them
};

}  // namespace minivmm::block::qcow2
