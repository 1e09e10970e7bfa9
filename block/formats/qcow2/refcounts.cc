// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/refcounts.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"
#include "block/formats/qcow2/refcount_codec.h"

namespace minivmm::block::qcow2 {

using base::Error;

Refcounts::Refcounts(ImageFile& image, MetadataCache& cache, MetadataMap& map)
    : image_(image),
      cache_(cache),
      map_(map),
      order_(image.geometry().refcount_order),
      slice_entries_((uint64_t{cache.slice_size()} * 8) >> order_),
      table_offset_(image.header().refcount_table_offset),
      table_clusters_(image.header().refcount_table_clusters) {}

void Refcounts::load_table() {
  base::Buffer bytes(image_.header().refcount_table_bytes());
  image_.file().read(table_offset_, bytes.io());
  std::vector<uint64_t> table(bytes.size() / 8);
  for (size_t i = 0; i < table.size(); ++i) {
    table[i] = base::load_be<uint64_t>(bytes.data() + i * 8);
    if (table[i] == 0) continue;
    const char* problem = refcount_table_problem(table[i], image_.geometry());
    const uint64_t cluster = table[i] >> image_.geometry().cluster_bits;
    if (problem == nullptr) problem = map_.find(cluster, 1) == nullptr ? nullptr : "it overlaps";
    if (problem != nullptr) {
      throw image_.corruption(
          fmt::format("refcount table entry {} ({:#x}) is invalid: {}", i, table[i], problem));
    }
    map_.add(cluster, kRefcountBlock);
  }
  const std::lock_guard lock(mutex_);
  table_ = std::move(table);
}

uint64_t Refcounts::table_entries() const {
  const std::lock_guard lock(mutex_);
  return table_.size();
}

uint64_t Refcounts::table_entry(uint64_t index) const {
  const std::lock_guard lock(mutex_);
  return index < table_.size() ? table_[index] : 0;
}

Refcounts::Place Refcounts::place(uint64_t cluster) {
  const Geometry& g = image_.geometry();
  const uint64_t block = table_entry(cluster >> g.block_bits());
  if (block == 0) return {};
  const uint64_t index = cluster & (g.block_entries() - 1);
  return {block + index / slice_entries_ * cache_.slice_size(), index % slice_entries_};
}

uint64_t Refcounts::get(uint64_t cluster) {
  const Place p = place(cluster);
  if (p.slice == 0) return 0;
  uint64_t out = 0;
  cache_.read(p.slice, [&](const std::byte* slice) { out = get_refcount(slice, p.index, order_); });
  return out;
}

uint64_t Refcounts::take_free(uint64_t first, uint64_t count) {
  uint64_t taken = 0;
  while (taken < count) {
    const Place p = place(first + taken);
    if (p.slice == 0) break;
    const uint64_t here = std::min(count - taken, slice_entries_ - p.index);
    uint64_t done = 0;
    try {
      cache_.change(p.slice, [&](std::byte* slice) {
        while (done < here && get_refcount(slice, p.index + done, order_) == 0) {
          set_refcount(slice, p.index + done, order_, 1);
          ++done;
        }
        return done != 0;
      });
    } catch (const Error&) {
      if (taken == 0) throw;
      return taken;  // what was taken is the caller's; the next call meets the error
    }
    taken += done;
    if (done < here) break;
  }
  return taken;
}

bool Refcounts::raise(uint64_t first, uint64_t count) {
  uint64_t done = 0;
  std::optional<uint64_t> stopped_at;  // the refcount that cannot be raised
  std::exception_ptr error;
  try {
    while (done < count && !stopped_at) {
      done += raise_in_slice(first + done, count - done, stopped_at);
    }
  } catch (...) {
    error = std::current_exception();
  }
  if (done == count) return true;
  for (uint64_t i = 0; i < done; ++i) lower(first + i);
  if (error) std::rethrow_exception(error);
  if (stopped_at != 0) return false;
  throw image_.corruption(fmt::format("cluster {:#x} is in use and has refcount 0",
                                      (first + done) << image_.geometry().cluster_bits));
}

// Those of at most `count` clusters that lie in one slice; returns how many. `stopped_at` is
// set if there is one that is 0 or at its limit.
uint64_t Refcounts::raise_in_slice(uint64_t first, uint64_t count,
                                   std::optional<uint64_t>& stopped_at) {
  const uint64_t most = image_.geometry().refcount_max();
  const Place p = place(first);
  if (p.slice == 0) {
    stopped_at = 0;
    return 0;
  }
  const uint64_t here = std::min(count, slice_entries_ - p.index);
  uint64_t done = 0;
  cache_.change(p.slice, [&](std::byte* slice) {
    for (; done < here; ++done) {
      const uint64_t old = get_refcount(slice, p.index + done, order_);
      if (old == 0 || old == most) {
        stopped_at = old;
        break;
      }
      set_refcount(slice, p.index + done, order_, old + 1);
    }
    return done != 0;
  });
  return done;
}

uint64_t Refcounts::lower(uint64_t cluster) {
  const Place p = place(cluster);
  uint64_t old = 0;
  if (p.slice != 0) {
    cache_.change(p.slice, [&](std::byte* slice) {
      old = get_refcount(slice, p.index, order_);
      if (old != 0) set_refcount(slice, p.index, order_, old - 1);
      return old != 0;
    });
  }
  if (old == 0) {
    throw image_.corruption(fmt::format("cluster {:#x} is in use and has refcount 0",
                                        cluster << image_.geometry().cluster_bits));
  }
  return old - 1;
}

void Refcounts::free_run(uint64_t first, uint64_t count) {
  for (uint64_t done = 0; done < count;) {
    const Place p = place(first + done);
    if (p.slice == 0) return;
    const uint64_t here = std::min(count - done, slice_entries_ - p.index);
    cache_.change(p.slice, [&](std::byte* slice) {
      for (uint64_t i = 0; i < here; ++i) set_refcount(slice, p.index + i, order_, 0);
      return true;
    });
    done += here;
  }
}

void Refcounts::find_free(uint64_t index, FreeRuns& out) {
  const uint64_t block = table_entry(index);
  if (block != 0) {
    scan_block(index, block, out);
  } else {
    make_block(index, out);
  }
}

void Refcounts::scan_block(uint64_t index, uint64_t block_offset, FreeRuns& out) {
  const Geometry& g = image_.geometry();
  uint64_t cluster = index << g.block_bits();
  // Searched in a copy, so that the shard's lock is held for a memcpy only.
  base::Buffer copy(cache_.slice_size());
  for (uint64_t at = 0; at < g.cluster_size(); at += copy.size()) {
    cache_.read(block_offset + at,
                [&](const std::byte* slice) { std::memcpy(copy.data(), slice, copy.size()); });
    uint64_t run = 0;
    for (uint64_t i = 0; i < slice_entries_; ++i) {
      if (get_refcount(copy.data(), i, order_) == 0) {
        ++run;
      } else if (run != 0) {
        out.add(cluster + i - run, run);
        run = 0;
      }
    }
    out.add(cluster + slice_entries_ - run, run);
    cluster += slice_entries_;
  }
}

// A new block lies in the range that it describes and counts itself, so that making it needs no
// other block. It is written before the table points to it.
void Refcounts::make_block(uint64_t index, FreeRuns& out) {
  const Geometry& g = image_.geometry();
  const uint64_t cluster = index << g.block_bits();
  const uint64_t offset = cluster << g.cluster_bits;
  if (offset >= kMaxHostOffset) throw Error(EFBIG, image_.name() + ": the image has no room left");
  if (const char* what = map_.find(cluster, 1)) {
    throw image_.corruption(
        fmt::format("refcount table entry {} is missing, and the {} lies in the range it describes",
                    index, what));
  }
  base::Buffer block = base::Buffer::zeroed(g.cluster_size());
  set_refcount(block.data(), 0, order_, 1);
  image_.file().write(offset, block.io());
  map_.add(cluster, kRefcountBlock);
  {
    const std::lock_guard lock(mutex_);
    table_[index] = offset;
    dirty_table_.push_back(static_cast<uint32_t>(index));
  }
  out.add(cluster + 1, g.block_entries() - 1);
}

struct Refcounts::Growth {
  uint64_t old_entries = 0;
  uint64_t first = 0;   // cluster where the new blocks begin
  uint64_t blocks = 0;  // that describe themselves, the table and some free room
  uint64_t table_clusters = 0;
  uint64_t table_first() const noexcept { return first + blocks; }
};

Refcounts::Growth Refcounts::plan_growth() const {
  const Geometry& g = image_.geometry();
  Growth out;
  out.old_entries = table_entries();
  out.first = out.old_entries << g.block_bits();
  const uint64_t most = kMaxRefcountTableBytes >> g.cluster_bits;
  const uint64_t entries_per_cluster = g.cluster_size() / 8;
  out.table_clusters = table_clusters_;
  for (;;) {
    if (out.table_clusters >= most) {
      throw Error(EFBIG,
                  fmt::format("{}: the refcount table is at its limit of 8 MiB", image_.name()));
    }
    out.table_clusters = std::min(most, out.table_clusters * 2);
    out.blocks = 1;
    while (out.blocks * g.block_entries() < out.blocks + out.table_clusters) ++out.blocks;
    if (out.table_clusters * entries_per_cluster >= out.old_entries + out.blocks) break;
  }
  const uint64_t end = (out.first + out.blocks * g.block_entries()) << g.cluster_bits;
  if (end >= kMaxHostOffset) throw Error(EFBIG, image_.name() + ": the image has no room left");
  return out;
}

// The blocks count themselves and the clusters behind them.
void Refcounts::write_blocks(const Growth& growth) {
  const Geometry& g = image_.geometry();
  base::Buffer block(g.cluster_size());
  uint64_t used = growth.blocks + growth.table_clusters;
  for (uint64_t i = 0; i < growth.blocks; ++i) {
    std::fill_n(block.data(), block.size(), std::byte{0});
    const uint64_t here = std::min(used, g.block_entries());
    for (uint64_t k = 0; k < here; ++k) set_refcount(block.data(), k, order_, 1);
    used -= here;
    image_.file().write((growth.first + i) << g.cluster_bits, block.io());
  }
}

void Refcounts::write_growth(const Growth& growth) {
  const Geometry& g = image_.geometry();
  write_blocks(growth);
  base::Buffer table = base::Buffer::zeroed(growth.table_clusters << g.cluster_bits);
  {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < table_.size(); ++i) base::store_be(table.data() + i * 8, table_[i]);
  }
  for (uint64_t i = 0; i < growth.blocks; ++i) {
    base::store_be(table.data() + (growth.old_entries + i) * 8, (growth.first + i)
                                                                    << g.cluster_bits);
  }
  image_.file().write(growth.table_first() << g.cluster_bits, table.io());
  // The header must not point to a table, nor the table to blocks, that a crash could lose.
  image_.file().flush();
  image_.set_refcount_table(growth.table_first() << g.cluster_bits,
                            static_cast<uint32_t>(growth.table_clusters));
}

uint64_t Refcounts::grow_table(FreeRuns& out) {
  const Geometry& g = image_.geometry();
  const std::lock_guard io(table_io_);
  const Growth growth = plan_growth();
  if (const char* there = map_.find(growth.first, growth.blocks + growth.table_clusters)) {
    throw image_.corruption(
        fmt::format("the {} lies behind what the {} describes", there, kRefcountTable));
  }
  write_growth(growth);
  const uint64_t old_first = table_offset_ >> g.cluster_bits;
  const uint64_t old_clusters = table_clusters_;
  table_offset_ = growth.table_first() << g.cluster_bits;
  table_clusters_ = growth.table_clusters;
  {
    const std::lock_guard lock(mutex_);
    table_.resize((growth.table_clusters << g.cluster_bits) / 8);
    for (uint64_t i = 0; i < growth.blocks; ++i) {
      table_[growth.old_entries + i] = (growth.first + i) << g.cluster_bits;
    }
    dirty_table_.clear();  // the new table on disk has every entry
  }
  for (uint64_t i = 0; i < growth.blocks; ++i) map_.add(growth.first + i, kRefcountBlock);
  map_.move_refcount_table(growth.table_first(), growth.table_clusters);
  out.add(growth.table_first() + growth.table_clusters,
          growth.blocks * (g.block_entries() - 1) - growth.table_clusters);
  // Nothing points to the old table any more, durably.
  for (uint64_t i = 0; i < old_clusters; ++i) {
    if (lower(old_first + i) == 0) out.add(old_first + i, 1);
  }
  return growth.old_entries + growth.blocks;
}

// The index after the last block.
uint64_t Refcounts::blocks_end() const {
  const std::lock_guard lock(mutex_);
  uint64_t end = table_.size();
  while (end > 0 && table_[end - 1] == 0) --end;
  return end;
}

uint64_t Refcounts::make_area(uint64_t clusters, FreeRuns& out) {
  const Geometry& g = image_.geometry();
  Growth area;
  area.table_clusters = clusters;
  area.blocks = 1;
  while (area.blocks * g.block_entries() < area.blocks + clusters) ++area.blocks;
  uint64_t index = blocks_end();
  while (index + area.blocks > table_entries()) {
    grow_table(out);
    index = blocks_end();
  }
  area.first = index << g.block_bits();
  const uint64_t end = area.first + area.blocks * g.block_entries();
  if (end >= kMaxHostOffset >> g.cluster_bits) {
    throw Error(EFBIG, image_.name() + ": the image has no room left");
  }
  if (const char* what = map_.find(area.first, end - area.first)) {
    throw image_.corruption(
        fmt::format("refcount table entry {} or one behind it is missing, and "
                    "the {} lies in the range",
                    index, what));
  }
  write_blocks(area);
  for (uint64_t i = 0; i < area.blocks; ++i) map_.add(area.first + i, kRefcountBlock);
  {
    const std::lock_guard lock(mutex_);
    for (uint64_t i = 0; i < area.blocks; ++i) {
      table_[index + i] = (area.first + i) << g.cluster_bits;
      dirty_table_.push_back(static_cast<uint32_t>(index + i));
    }
  }
  out.add(area.table_first() + clusters, end - area.table_first() - clusters);
  return area.table_first();
}

Refcounts::TableChanges Refcounts::take_dirty_table() {
  TableChanges out;
  const std::lock_guard lock(mutex_);
  for (const uint32_t index : dirty_table_) out.emplace_back(index, table_[index]);
  dirty_table_.clear();
  return out;
}

void Refcounts::write_table(const TableChanges& changes) {
  const std::lock_guard io(table_io_);
  const unsigned bits = image_.geometry().cluster_bits;
  if (const char* there = map_.find(table_offset_ >> bits, table_clusters_, kRefcountTable)) {
    throw image_.corruption(fmt::format("the {} lies on the {}", kRefcountTable, there));
  }
  for (const auto& [index, offset] : changes) {
    std::byte entry[8];
    base::store_be(entry, offset);
    image_.file().write(table_offset_ + uint64_t{index} * 8,
                        base::SingleBuffer(std::span<const std::byte>(entry)));
  }
}

void Refcounts::failed(const TableChanges& changes) {
  const std::lock_guard lock(mutex_);
  for (const auto& change : changes) dirty_table_.push_back(change.first);
}

}  // namespace minivmm::block::qcow2
