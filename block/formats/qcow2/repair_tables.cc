// SPDX-License-Identifier: Apache-2.0
// The entries of L1 and L2 tables.
#include <algorithm>
#include <cerrno>

#include "base/bytes.h"
#include "block/formats/qcow2/listing.h"
#include "block/formats/qcow2/mend_entry.h"
#include "block/formats/qcow2/repairer.h"

namespace minivmm::block::qcow2 {

bool Repairer::mend_tables() {
  bool changed = false;
  {
    Checker found(file_, header_, silent_);
    found.count_references();
    changed = mend_l1(found, header_.l1_offset, header_.l1_size);
    if (mend_snapshots(found)) changed = true;
    if (!changed && mend_l2_tables(found)) {
      file_.flush();
      return true;
    }
  }
  if (!changed) return false;
  file_.flush();
  // The L1 tables refer to other L2 tables now.
  Checker found(file_, header_, silent_);
  found.count_references();
  mend_l2_tables(found);
  file_.flush();
  return true;
}

bool Repairer::mend_snapshots(const Checker& found) {
  bool changed = false;
  try {
    for (const SnapshotEntry& snapshot : read_snapshots(file_, header_)) {
      const uint64_t bytes = uint64_t{snapshot.l1_size} * 8;
      if (bytes == 0 || bytes > kMaxL1Bytes || snapshot.l1_offset >= kMaxHostOffset ||
          !in_file(snapshot.l1_offset, bytes)) {
        continue;
      }
      // Only where there is nothing but this table, and it is what the check took it for.
      bool alone = geometry_.offset_in_cluster(snapshot.l1_offset) == 0;
      const uint64_t first = snapshot.l1_offset >> geometry_.cluster_bits;
      for (uint64_t i = 0; alone && i < geometry_.clusters(bytes); ++i) {
        alone = found.counts().get(first + i) == 1;
      }
      if (alone && mend_l1(found, snapshot.l1_offset, snapshot.l1_size)) changed = true;
    }
  } catch (const base::Error& e) {
    if (e.err() != EINVAL) throw;
    say(std::string("The snapshots' tables are left as they are: ") + e.what());
  }
  return changed;
}

bool Repairer::mend_l1(const Checker& found, uint64_t offset, uint64_t entries) {
  if (entries == 0) return false;
  const Table old = read_table(offset, entries);
  const Table mended = mended_l1(found, old);
  Words changes;
  for (uint64_t i = 0; i < entries; ++i) {
    if (mended[i] == old[i]) continue;
    say(fmt::format("Repairing L1 entry {} of the table at {:#x}: {:#x} -> {:#x}", i, offset,
                    old[i], mended[i]));
    changes.emplace_back(offset + i * 8, mended[i]);
  }
  if (!changes.empty()) mark_dirty();
  write_words(changes);
  corruptions_fixed_ += changes.size();
  return !changes.empty();
}

Repairer::Table Repairer::mended_l1(const Checker& found, const Table& old) {
  Table out(old.size());
  std::vector<std::pair<uint64_t, size_t>> tables;  // L2 table, index
  for (size_t i = 0; i < old.size(); ++i) {
    if (old[i] != 0) out[i] = mended_l1_entry(found, old[i], i);
    if (out[i] != 0) tables.emplace_back(out[i] & kOffsetMask, i);
  }
  // No two entries have the same table. Which of them is right cannot be known; where the other
  // one's part of the disk was is lost in any case.
  std::sort(tables.begin(), tables.end());
  for (size_t i = 1; i < tables.size(); ++i) {
    if (tables[i].first == tables[i - 1].first) out[tables[i].second] = 0;
  }
  return out;
}

uint64_t Repairer::mended_l1_entry(const Checker& found, uint64_t raw, uint64_t l1_index) {
  const uint64_t out = raw & (kFlagCopied | kOffsetMask);
  const uint64_t table = out & kOffsetMask;
  if (l1_problem(out, geometry_) != nullptr) return 0;
  if (!in_file(table, geometry_.cluster_size())) return 0;
  if (is_fixed(table >> geometry_.cluster_bits)) return 0;
  return is_garbage(found, table, l1_index) ? 0 : out;
}

// A cluster that is more than an L2 table, and makes no sense as one.
bool Repairer::is_garbage(const Checker& found, uint64_t table, uint64_t l1_index) {
  const auto& uses = found.l2_uses();
  const auto use = std::lower_bound(
      uses.begin(), uses.end(), table,
      [](const Checker::L2Use& known, uint64_t offset) { return known.offset < offset; });
  const uint64_t times = use != uses.end() && use->offset == table ? use->times : 0;
  if (found.counts().get(table >> geometry_.cluster_bits) <= times) return false;
  const base::Buffer& bytes = read_cluster(table);
  uint64_t guest_offset = l1_index << geometry_.l1_shift();
  uint64_t entries = 0;
  uint64_t bad = 0;
  for (uint64_t i = 0; i < geometry_.l2_entries(); ++i, guest_offset += geometry_.cluster_size()) {
    const RawL2 raw = load_l2(bytes.data() + i * geometry_.l2_entry_bytes(), geometry_);
    if (raw == RawL2{}) continue;
    ++entries;
    const L2Entry entry = decode_l2(raw, geometry_, guest_offset);
    const uint64_t length = entry.compressed ? entry.compressed_bytes : geometry_.cluster_size();
    const bool lost =
        clusters_of(entry, geometry_).count != 0 && !in_file(entry.host_offset, length);
    if (entry.problem != nullptr || lost) ++bad;
  }
  return bad > entries / 2;
}

bool Repairer::mend_l2_tables(const Checker& found) {
  bool changed = false;
  for (const Checker::L2Use& use : found.l2_uses()) {
    if (mend_l2_table(found, use)) changed = true;
  }
  return changed;
}

bool Repairer::mend_l2_table(const Checker& found, const Checker::L2Use& use) {
  base::Buffer& bytes = read_cluster(use.offset);
  uint64_t guest_offset = use.l1_index << geometry_.l1_shift();
  const size_t step = geometry_.l2_entry_bytes();
  size_t begin = bytes.size();
  size_t end = 0;
  for (size_t at = 0; at < bytes.size(); at += step, guest_offset += geometry_.cluster_size()) {
    const RawL2 raw = load_l2(bytes.data() + at, geometry_);
    if (raw == RawL2{}) continue;
    const RawL2 mended = mended_l2_entry(found, raw, guest_offset);
    if (mended == raw) continue;
    say(fmt::format("Repairing L2 entry {} of the table at {:#x}: {:#x} -> {:#x}", at / step,
                    use.offset, raw.entry, mended.entry));
    store_l2(bytes.data() + at, mended, geometry_);
    ++corruptions_fixed_;
    begin = std::min(begin, at);
    end = at + step;
  }
  if (end == 0) return false;
  mark_dirty();
  write_changed(use.offset, bytes, begin, end);
  return true;
}

RawL2 Repairer::mended_l2_entry(const Checker& found, RawL2 raw, uint64_t guest_offset) const {
  const RawL2 out = mend_l2(raw, geometry_, guest_offset);
  const L2Entry entry = decode_l2(out, geometry_, guest_offset);
  const HostClusters clusters = clusters_of(entry, geometry_);
  if (clusters.count == 0) return out;
  const uint64_t bytes = entry.compressed ? entry.compressed_bytes : geometry_.cluster_size();
  if (!in_file(entry.host_offset, bytes) || is_metadata(found, clusters.first, clusters.count)) {
    return without_host(out, geometry_);
  }
  return out;
}

bool Repairer::mend_copied() {
  Checker now(file_, header_, silent_);
  now.count_references();
  const ClusterCounts& counts = now.counts();
  if (header_.l1_size == 0) return false;
  const Table l1 = read_table(header_.l1_offset, header_.l1_size);
  Words changes;
  bool changed = false;
  for (uint64_t i = 0; i < header_.l1_size; ++i) {
    const uint64_t raw = l1[i];
    const uint64_t table = raw & kOffsetMask;
    if (raw == 0 || l1_problem(raw, geometry_) != nullptr) continue;
    const uint64_t count = counts.get(table >> geometry_.cluster_bits);
    const uint64_t right = count == 1 ? table | kFlagCopied : table;
    if (right != raw) {
      say(fmt::format("Repairing OFLAG_COPIED L2 cluster: l1_index={} l1_entry={:x} refcount={}", i,
                      raw, count));
      changes.emplace_back(header_.l1_offset + i * 8, right);
    }
    if (mend_copied_l2(counts, table)) changed = true;
  }
  if (!changes.empty()) clear_autoclear();
  write_words(changes);
  corruptions_fixed_ += changes.size();
  return changed || !changes.empty();
}

bool Repairer::mend_copied_l2(const ClusterCounts& counts, uint64_t table) {
  base::Buffer& bytes = read_cluster(table);
  const size_t step = geometry_.l2_entry_bytes();
  size_t begin = bytes.size();
  size_t end = 0;
  for (size_t at = 0; at < bytes.size(); at += step) {
    const RawL2 raw = load_l2(bytes.data() + at, geometry_);
    const uint64_t offset = raw.entry & kOffsetMask;
    const bool copied = (raw.entry & kFlagCopied) != 0;
    if ((raw.entry & kFlagCompressed) != 0) continue;
    if (offset == 0 && !(geometry_.external_data && copied)) continue;
    const bool alone = geometry_.external_data || counts.get(offset >> geometry_.cluster_bits) == 1;
    if (alone == copied) continue;
    say(fmt::format("Repairing OFLAG_COPIED data cluster: l2_entry={:x} refcount={}", raw.entry,
                    geometry_.external_data ? 1 : counts.get(offset >> geometry_.cluster_bits)));
    store_l2(bytes.data() + at, {raw.entry ^ kFlagCopied, raw.bitmap}, geometry_);
    ++corruptions_fixed_;
    begin = std::min(begin, at);
    end = at + step;
  }
  if (end == 0) return false;
  clear_autoclear();
  write_changed(table, bytes, begin, end);
  return true;
}

// Metadata of the active disk, that is, but not refcounts: they are cheaper to make anew than what
// lies on top of them.
bool Repairer::is_metadata(const Checker& found, uint64_t first, uint64_t count) const {
  const auto& uses = found.l2_uses();
  for (uint64_t cluster = first; cluster < first + count; ++cluster) {
    if (is_fixed(cluster)) return true;
    if (found.counts().get(cluster) < 2) continue;  // nothing else is there
    const auto use = std::lower_bound(
        uses.begin(), uses.end(), cluster << geometry_.cluster_bits,
        [](const Checker::L2Use& known, uint64_t wanted) { return known.offset < wanted; });
    if (use != uses.end() && use->offset == cluster << geometry_.cluster_bits && use->active) {
      return true;
    }
  }
  return false;
}

// The header or the active L1 table.
bool Repairer::is_fixed(uint64_t cluster) const noexcept {
  const uint64_t first = header_.l1_offset >> geometry_.cluster_bits;
  return cluster == 0 ||
         (cluster >= first && cluster - first < geometry_.clusters(uint64_t{header_.l1_size} * 8));
}

// The last cluster of a file may be cut short.
bool Repairer::in_file(uint64_t offset, uint64_t bytes) const {
  const uint64_t size = file_.size();
  return offset < size && bytes <= size - offset + geometry_.cluster_size();
}

}  // namespace minivmm::block::qcow2
