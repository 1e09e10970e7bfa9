// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/snapshots/tree_switch.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/bytes.h"
#include "block/formats/qcow2/image.h"

namespace minivmm::block::qcow2 {

TreeSwitch::~TreeSwitch() {
  const bool broken = image_.file().broken();
  // After an error there, where writes are refused, nobody knows what the header points to.
  if (finished_ || (switching_ && broken)) return;
  if (copied_) {
    Refcounts& refcounts = image_.refcounts();
    refcounts.forget(refcounts.exchange(std::move(other_)));
  }
  if (broken) return;
  for (const Allocator::Run& run : taken_) image_.allocator().give_back(run.offset, run.clusters);
}

uint64_t TreeSwitch::take(uint64_t clusters) {
  const uint64_t offset = image_.allocator().allocate_together(clusters);
  taken_.push_back({offset, clusters, false});
  return offset;
}

void TreeSwitch::put_back(uint64_t offset) noexcept {
  const auto it = std::find_if(taken_.begin(), taken_.end(),
                               [&](const Allocator::Run& run) { return run.offset == offset; });
  image_.allocator().give_back(it->offset, it->clusters);
  taken_.erase(it);
}

void TreeSwitch::take_l2_tables(uint64_t count) {
  const unsigned bits = image_.file().geometry().cluster_bits;
  l2_tables_.reserve(count);
  while (l2_tables_.size() < count) {
    const Allocator::Run run = image_.allocator().allocate(count - l2_tables_.size());
    taken_.push_back(run);
    for (uint64_t i = 0; i < run.clusters; ++i) l2_tables_.push_back(run.offset + (i << bits));
  }
  std::reverse(l2_tables_.begin(), l2_tables_.end());  // they are taken from the end
}

// Taking room may make new blocks, and the table larger, of which there has to be a copy as well.
void TreeSwitch::copy_refcounts() {
  const unsigned bits = image_.file().geometry().cluster_bits;
  Refcounts& refcounts = image_.refcounts();
  std::vector<uint64_t> blocks;
  uint64_t table = 0;
  uint64_t table_clusters = 0;
  do {
    while (blocks.size() < refcounts.blocks()) {
      const Allocator::Run run = image_.allocator().allocate(refcounts.blocks() - blocks.size());
      taken_.push_back(run);
      for (uint64_t i = 0; i < run.clusters; ++i) blocks.push_back(run.offset + (i << bits));
    }
    if (table_clusters != refcounts.table_place().clusters) {
      if (table_clusters != 0) put_back(table);
      table_clusters = refcounts.table_place().clusters;
      table = take(table_clusters);
    }
  } while (blocks.size() < refcounts.blocks() ||
           table_clusters != refcounts.table_place().clusters);
  other_ = refcounts.use_copy(table, blocks);
  copied_ = true;
}

void TreeSwitch::raise_data(const L1Entries& l1) {
  const unsigned bits = image_.file().geometry().cluster_bits;
  ClusterRun run;  // references to neighbours go up together
  const auto flush = [&] {
    const ClusterRun now = std::exchange(run, {});
    if (now.count != 0 && !image_.refcounts().raise(now.first, now.count)) {
      throw base::Error(
          EFBIG, fmt::format("{}: one of {} clusters at {:#x} has as many references as refcounts "
                             "of {} bits count",
                             image_.file().name(), now.count, now.first << bits,
                             1U << image_.file().geometry().refcount_order));
    }
    if (image_.under_pressure()) image_.commit();
  };
  walk_tree(image_.file(), l1, [&](HostClusters clusters, bool is_table) {
    if (is_table) return;
    if (run.count != 0 && clusters.first == run.first + run.count) {
      run.count += clusters.count;
      return;
    }
    flush();
    run = {clusters.first, clusters.count};
  });
  flush();
}

void TreeSwitch::lower_tree(const L1Entries& l1) {
  walk_tree(image_.file(), l1, [&](HostClusters clusters, bool is_table) {
    // Freeing metadata because a damaged entry points to it would punch a hole into it.
    const char* there = image_.metadata().find(clusters.first, clusters.count);
    if (there != nullptr && !(is_table && there == kL2Table)) {
      throw image_.file().corruption(
          fmt::format("an L{} entry points to the {}", is_table ? 1 : 2, there));
    }
    for (uint64_t i = 0; i < clusters.count; ++i) image_.refcounts().lower(clusters.first + i);
    if (image_.under_pressure()) image_.commit();
  });
}

void TreeSwitch::lower(uint64_t offset, uint64_t clusters) {
  const uint64_t first = offset >> image_.file().geometry().cluster_bits;
  for (uint64_t i = 0; i < clusters; ++i) image_.refcounts().lower(first + i);
  if (clusters != 0) lowered_.push_back({first, clusters});
}

void TreeSwitch::load_table(uint64_t l1_entry) {
  if (bytes_.size() == 0) bytes_ = base::Buffer(image_.file().geometry().cluster_size());
  image_.file().file().read(l1_entry & kOffsetMask, bytes_.io());
}

uint64_t TreeSwitch::write_copy() {
  // Room was taken for what L1 entries point to; an entry of flags alone points to nothing.
  if (l2_tables_.empty()) throw image_.file().corruption("an L1 entry points to no L2 table");
  const uint64_t to = l2_tables_.back();
  image_.file().file().write(to, bytes_.io());
  l2_tables_.pop_back();
  return to | kFlagCopied;
}

uint64_t TreeSwitch::copy_shared_table(uint64_t l1_entry) {
  const Geometry& g = image_.file().geometry();
  load_table(l1_entry);
  for (uint64_t at = 0; at < bytes_.size(); at += g.l2_entry_bytes()) {
    const auto entry = base::load_be<uint64_t>(bytes_.data() + at);
    if ((entry & kFlagCompressed) != 0) continue;
    base::store_be(bytes_.data() + at, entry & ~kFlagCopied);
  }
  return write_copy();
}

uint64_t TreeSwitch::refresh_table(uint64_t l1_index, uint64_t l1_entry) {
  const Geometry& g = image_.file().geometry();
  const uint64_t table = l1_entry & kOffsetMask;
  // What a shared table refers to is shared: its flags are clear.
  if (image_.refcounts().get(table >> g.cluster_bits) != 1) return table;
  load_table(l1_entry);
  bool changed = false;
  uint64_t guest_offset = l1_index << g.l1_shift();
  for (uint64_t at = 0; at < bytes_.size();
       at += g.l2_entry_bytes(), guest_offset += g.cluster_size()) {
    const RawL2 raw = load_l2(bytes_.data() + at, g);
    const L2Entry entry = decode_l2(raw, g, guest_offset);
    if (entry.problem != nullptr || !entry.has_host) continue;
    const bool ours = image_.refcounts().get(entry.host_offset >> g.cluster_bits) == 1;
    if (ours == entry.copied) continue;
    base::store_be(bytes_.data() + at, raw.entry ^ kFlagCopied);
    changed = true;
  }
  if (!changed) return table | kFlagCopied;
  lower(table, 1);
  return write_copy();
}

void TreeSwitch::write_table(uint64_t offset, const L1Entries& entries) {
  const Geometry& g = image_.file().geometry();
  base::Buffer bytes = base::Buffer::zeroed(g.clusters(entries.size() * 8) << g.cluster_bits);
  for (size_t i = 0; i < entries.size(); ++i) base::store_be(bytes.data() + i * 8, entries[i]);
  image_.file().file().write(offset, bytes.io());
}

void TreeSwitch::finish(const HeaderUpdate::Change& change) {
  Refcounts& refcounts = image_.refcounts();
  for (const uint64_t unused : std::exchange(l2_tables_, {})) lower(unused, 1);
  for (const uint64_t block : other_.blocks) {
    if (block != 0) lower(block, 1);
  }
  lower(other_.offset, other_.clusters);
  image_.commit();
  const Refcounts::TablePlace where = refcounts.table_place();
  switching_ = true;
  image_.file().change_numbers([&](Header& h) {
    h.refcount_table_offset = where.offset;
    h.refcount_table_clusters = static_cast<uint32_t>(where.clusters);
    change(h);
  });
  finished_ = true;
  refcounts.forget(other_);
}

// Adds clusters to a run of those that nothing refers to; frees the run when it ends.
void TreeSwitch::collect(uint64_t first, uint64_t count, ClusterRun& run) {
  for (uint64_t cluster = first; cluster < first + count; ++cluster) {
    if (image_.refcounts().get(cluster) != 0) continue;
    if (run.count != 0 && cluster != run.first + run.count) {
      image_.free_unused(std::exchange(run, {}));
    }
    if (run.count == 0) run.first = cluster;
    ++run.count;
  }
}

void TreeSwitch::free(const L1Entries& lowered_tree) {
  ClusterRun run;
  walk_tree(image_.file(), lowered_tree, [&](HostClusters clusters, bool is_table) {
    if (is_table) {
      lowered_.push_back({clusters.first, clusters.count});  // it is read first
    } else {
      collect(clusters.first, clusters.count, run);
    }
  });
  for (const ClusterRun& table : lowered_) collect(table.first, table.count, run);
  if (run.count != 0) image_.free_unused(run);
}

}  // namespace minivmm::block::qcow2
