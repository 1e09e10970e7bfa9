// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/overlap.h"

#include <algorithm>
#include <bit>

#include "block/formats/qcow2/tables.h"

namespace minivmm::block::qcow2 {

namespace {

// 16 bits a table let about one cluster of data in 16 pass where all tables exist; up to 2 MiB.
unsigned filter_bits(const Header& h) {
  const auto wanted = static_cast<unsigned>(std::bit_width(uint64_t{h.l1_size} * 16));
  return std::clamp(wanted, 16U, 24U);
}

}  // namespace

MetadataMap::MetadataMap(const Header& h)
    : filter_bits_(filter_bits(h)),
      filter_(std::make_unique<std::atomic<uint64_t>[]>((size_t{1} << filter_bits_) / 64)) {
  const Geometry g = h.geometry();
  const auto place = [&](Place& to, uint64_t offset, uint64_t bytes) {
    to.set(offset >> g.cluster_bits, g.clusters(bytes));
  };
  // The size of the snapshot table is only known by reading it: this much at least.
  place(snapshots_, h.snapshots_offset, uint64_t{h.snapshots} * kSnapshotFixedBytes);
  place(l1_, h.l1_offset, uint64_t{h.l1_size} * 8);
  table_first_ = h.refcount_table_offset >> g.cluster_bits;
  table_end_ = table_first_ + g.clusters(h.refcount_table_bytes());
  if (h.luks) place(luks_, h.luks->offset, h.luks->length);
}

void MetadataMap::add(uint64_t cluster, const char* what) {
  const size_t bit = filter_bit(cluster);
  const std::lock_guard lock(mutex_);
  clusters_.emplace(cluster, what);
  filter_[bit / 64].fetch_or(uint64_t{1} << (bit % 64), std::memory_order_relaxed);
}

namespace {

bool is_beside(const char* what) {
  return what == kSnapshotL1 || what == kBitmapDirectory || what == kBitmapTable;
}

}  // namespace

bool MetadataMap::remove(uint64_t cluster) {
  if (!may_contain(cluster)) return false;
  const std::lock_guard lock(mutex_);
  const auto it = clusters_.find(cluster);
  if (it == clusters_.end()) return false;
  if (is_beside(it->second)) --beside_;
  clusters_.erase(it);  // the filter's bit stays: it only costs a look at the set
  return true;
}

void MetadataMap::add_beside(uint64_t first, uint64_t count, const char* what) {
  const std::lock_guard lock(mutex_);
  for (uint64_t cluster = first; cluster < first + count && beside_ < kMostBeside; ++cluster) {
    // Many tables in one place would take for ever.
    if (!clusters_.emplace(cluster, what).second) return;
    ++beside_;
    const size_t bit = filter_bit(cluster);
    filter_[bit / 64].fetch_or(uint64_t{1} << (bit % 64), std::memory_order_relaxed);
  }
}

void MetadataMap::remove_beside(uint64_t first, uint64_t count) {
  const std::lock_guard lock(mutex_);
  for (uint64_t cluster = first; cluster < first + count; ++cluster) {
    const auto it = clusters_.find(cluster);
    if (it == clusters_.end() || !is_beside(it->second)) continue;
    --beside_;
    clusters_.erase(it);
  }
}

void MetadataMap::move_refcount_table(uint64_t first_cluster, uint64_t clusters) {
  // Between the two stores the range is too large or empty; nothing is handed out from either
  // place then, because growing the table excludes other refills.
  table_first_.store(first_cluster, std::memory_order_relaxed);
  table_end_.store(first_cluster + clusters, std::memory_order_relaxed);
}

void MetadataMap::move_l1_table(uint64_t first_cluster, uint64_t clusters) {
  l1_.set(first_cluster, clusters);
}

void MetadataMap::move_snapshot_table(uint64_t first_cluster, uint64_t clusters) {
  snapshots_.set(first_cluster, clusters);
}

void MetadataMap::Place::set(uint64_t first, uint64_t clusters) noexcept {
  const uint64_t most = (1ULL << kCountBits) - 1;
  word_.store(first << kCountBits | std::min(clusters, most), std::memory_order_relaxed);
}

bool MetadataMap::Place::touches(uint64_t first, uint64_t end) const noexcept {
  const uint64_t word = word_.load(std::memory_order_relaxed);
  const uint64_t begin = word >> kCountBits;
  const uint64_t count = word & ((1ULL << kCountBits) - 1);
  return count != 0 && first < begin + count && begin < end;
}

const char* MetadataMap::find(uint64_t first, uint64_t count, const char* except) const {
  const uint64_t end = first + count;
  if (first == 0 && except != kHeader) return kHeader;
  if (luks_.touches(first, end)) return kLuksHeader;
  if (snapshots_.touches(first, end) && except != kSnapshotTable) return kSnapshotTable;
  if (l1_.touches(first, end) && except != kL1Table) return kL1Table;
  if (first < table_end_.load(std::memory_order_relaxed) &&
      table_first_.load(std::memory_order_relaxed) < end && except != kRefcountTable) {
    return kRefcountTable;
  }
  for (uint64_t cluster = first; cluster < end; ++cluster) {
    if (!may_contain(cluster)) continue;
    const std::lock_guard lock(mutex_);
    const auto it = clusters_.find(cluster);
    if (it != clusters_.end() && it->second != except) return it->second;
  }
  return nullptr;
}

}  // namespace minivmm::block::qcow2
