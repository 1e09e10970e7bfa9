// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/overlap.h"

#include <algorithm>
#include <bit>

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
  const auto range = [&](uint64_t offset, uint64_t bytes, const char* what) {
    const uint64_t first = offset >> g.cluster_bits;
    return Range{first, first + g.clusters(bytes), what};
  };
  fixed_[0] = {0, 1, "header"};
  // The size of the snapshot table is only known by reading it: this much at least.
  fixed_[1] = range(h.snapshots_offset, uint64_t{h.snapshots} * 40, "snapshot table");
  if (h.luks) fixed_[2] = range(h.luks->offset, h.luks->length, "LUKS header");
  const Range l1 = range(h.l1_offset, uint64_t{h.l1_size} * 8, "");
  move_l1_table(l1.first, l1.end - l1.first);
  const Range table = range(h.refcount_table_offset, h.refcount_table_bytes(), "");
  table_first_ = table.first;
  table_end_ = table.end;
}

void MetadataMap::add(uint64_t cluster, const char* what) {
  const size_t bit = filter_bit(cluster);
  const std::lock_guard lock(mutex_);
  clusters_.emplace(cluster, what);
  filter_[bit / 64].fetch_or(uint64_t{1} << (bit % 64), std::memory_order_relaxed);
}

bool MetadataMap::remove(uint64_t cluster) {
  if (!may_contain(cluster)) return false;
  const std::lock_guard lock(mutex_);
  return clusters_.erase(cluster) != 0;  // the filter's bit stays: it only costs a look at the set
}

void MetadataMap::move_refcount_table(uint64_t first_cluster, uint64_t clusters) {
  // Between the two stores the range is too large or empty; nothing is handed out from either
  // place then, because growing the table excludes other refills.
  table_first_.store(first_cluster, std::memory_order_relaxed);
  table_end_.store(first_cluster + clusters, std::memory_order_relaxed);
}

void MetadataMap::move_l1_table(uint64_t first_cluster, uint64_t clusters) {
  l1_.store(first_cluster << kL1CountBits | clusters, std::memory_order_relaxed);
}

void MetadataMap::move_snapshot_table(uint64_t first_cluster, uint64_t clusters) {
  fixed_[1] = {first_cluster, first_cluster + clusters, "snapshot table"};
}

const char* MetadataMap::find(uint64_t first, uint64_t count) const {
  const uint64_t end = first + count;
  for (const Range& range : fixed_) {
    if (first < range.end && range.first < end) return range.what;
  }
  const uint64_t l1 = l1_.load(std::memory_order_relaxed);
  const uint64_t l1_first = l1 >> kL1CountBits;
  const uint64_t l1_clusters = l1 & ((1ULL << kL1CountBits) - 1);
  if (first < l1_first + l1_clusters && l1_first < end) return "L1 table";
  if (first < table_end_.load(std::memory_order_relaxed) &&
      table_first_.load(std::memory_order_relaxed) < end) {
    return "refcount table";
  }
  for (uint64_t cluster = first; cluster < end; ++cluster) {
    if (!may_contain(cluster)) continue;
    const std::lock_guard lock(mutex_);
    const auto it = clusters_.find(cluster);
    if (it != clusters_.end()) return it->second;
  }
  return nullptr;
}

}  // namespace minivmm::block::qcow2
