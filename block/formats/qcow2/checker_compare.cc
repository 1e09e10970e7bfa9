// SPDX-License-Identifier: Apache-2.0
// The second half of a check: what was counted against what the image says.
#include <algorithm>

#include "base/bytes.h"
#include "block/formats/qcow2/checker.h"
#include "block/formats/qcow2/refcount_codec.h"

namespace minivmm::block::qcow2 {

void Checker::compare() {
  for (uint64_t index = 0; index < refcount_table_.size(); ++index) {
    if (index << geometry_.block_bits() >= compared_clusters()) break;
    if (refcount_table_[index] != 0) compare_block(index);
  }
  compare_unblocked();
}

uint64_t Checker::compared_clusters() const {
  const uint64_t in_file = geometry_.clusters(file_size_);
  return counts_.get(in_file) != 0 ? in_file + 1 : in_file;
}

void Checker::compare_block(uint64_t index) {
  const uint64_t first = index << geometry_.block_bits();
  const uint64_t here = std::min(geometry_.block_entries(), compared_clusters() - first);
  if (block_.size() == 0) block_ = base::Buffer(geometry_.cluster_size());
  if (!read(refcount_table_[index], block_, "refcount block")) {
    needs_rebuild_ = true;
    return;
  }
  for (uint64_t i = 0; i < here; ++i) {
    compare_cluster(first + i, get_refcount(block_.data(), i, geometry_.refcount_order));
  }
}

// Clusters that are used and have no refcount block.
void Checker::compare_unblocked() {
  for (const uint64_t chunk : counts_.chunks()) {
    for (uint64_t cluster = chunk; cluster < chunk + ClusterCounts::kChunk; ++cluster) {
      const uint64_t index = cluster >> geometry_.block_bits();
      const bool has_block = index < refcount_table_.size() && refcount_table_[index] != 0;
      if (has_block || counts_.get(cluster) == 0) continue;
      needs_rebuild_ = true;
      compare_cluster(cluster, 0);
    }
  }
}

void Checker::compare_cluster(uint64_t cluster, uint64_t refcount) {
  const uint64_t counted = counts_.get(cluster);
  if (refcount != 0 || counted != 0) {
    result_.image_end_offset =
        std::max(result_.image_end_offset, (cluster + 1) << geometry_.cluster_bits);
  }
  if (refcount == counted) return;
  if (counted != 0) wrong_[cluster] = refcount;
  if (refcount > counted) {
    ++result_.leaks;
    say(fmt::format("Leaked cluster {} refcount={} reference={}", cluster, refcount, counted));
  } else {
    corruption("cluster {} refcount={} reference={}", cluster, refcount, counted);
  }
}

// Of a cluster that is used. The blocks were read once; most refcounts are what was counted.
uint64_t Checker::refcount_on_disk(uint64_t cluster) const {
  if (wrong_.empty()) return counts_.get(cluster);
  const auto it = wrong_.find(cluster);
  return it != wrong_.end() ? it->second : counts_.get(cluster);
}

// COPIED says "refcount is 1", for what the active L1 table reaches.
void Checker::check_copied() {
  for (size_t i = 0; i < l1_.size(); ++i) {
    if (l1_[i] != 0) check_copied_l2(i, l1_[i]);
  }
}

void Checker::check_copied_l2(uint64_t l1_index, uint64_t l1_entry) {
  const uint64_t table = l1_entry & kOffsetMask;
  const uint64_t table_refcount = refcount_on_disk(table >> geometry_.cluster_bits);
  if ((table_refcount == 1) != ((l1_entry & kFlagCopied) != 0)) {
    corruption("OFLAG_COPIED L2 cluster: l1_index={} l1_entry={:x} refcount={}", l1_index, l1_entry,
               table_refcount);
  }
  uint64_t guest_offset = l1_index << geometry_.l1_shift();
  each_l2_entry(table, [&](RawL2 raw) {
    check_copied_entry(raw, guest_offset);
    guest_offset += geometry_.cluster_size();
  });
}

void Checker::check_copied_entry(RawL2 raw, uint64_t guest_offset) {
  L2Entry entry;
  if (is_plain(raw)) {
    entry.has_host = true;
    entry.copied = (raw.entry & kFlagCopied) != 0;
    entry.host_offset = raw.entry & kOffsetMask;
  } else {
    entry = decode_l2(raw, geometry_, guest_offset);
  }
  if (entry.problem != nullptr || !entry.has_host) return;
  // Clusters of an external data file count as used once.
  const uint64_t refcount =
      geometry_.external_data ? 1 : refcount_on_disk(entry.host_offset >> geometry_.cluster_bits);
  if ((refcount == 1) != entry.copied) {
    corruption("OFLAG_COPIED data cluster: l2_entry={:x} refcount={}", raw.entry, refcount);
  }
}

}  // namespace minivmm::block::qcow2
