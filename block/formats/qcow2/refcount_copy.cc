// SPDX-License-Identifier: Apache-2.0
// Refcounts: the part that makes a copy of all of them and goes over to it.
#include <algorithm>
#include <utility>

#include "base/buffer.h"
#include "base/bytes.h"
#include "block/formats/qcow2/refcounts.h"

namespace minivmm::block::qcow2 {

uint64_t Refcounts::blocks() const {
  const std::lock_guard lock(mutex_);
  return static_cast<uint64_t>(
      std::count_if(table_.begin(), table_.end(), [](uint64_t block) { return block != 0; }));
}

Refcounts::TablePlace Refcounts::table_place() {
  const std::lock_guard io(table_io_);
  return {table_offset_, table_clusters_};
}

// Out of the cache, which knows more than the file.
void Refcounts::copy_block(uint64_t from, uint64_t to) {
  base::Buffer block(image_.geometry().cluster_size());
  for (uint64_t at = 0; at < block.size(); at += cache_.slice_size()) {
    cache_.read(from + at, [&](const std::byte* slice) {
      std::copy_n(slice, cache_.slice_size(), block.data() + at);
    });
  }
  image_.file().write(to, block.io());
}

Refcounts::Tables Refcounts::use_copy(uint64_t table, const std::vector<uint64_t>& blocks) {
  const unsigned bits = image_.geometry().cluster_bits;
  Tables copy{{table, table_place().clusters}, {}, {}};
  {
    const std::lock_guard lock(mutex_);
    copy.blocks = table_;
  }
  base::Buffer bytes = base::Buffer::zeroed(copy.clusters << bits);
  auto next = blocks.begin();
  for (size_t i = 0; i < copy.blocks.size(); ++i) {
    if (copy.blocks[i] == 0) continue;
    copy_block(copy.blocks[i], *next);
    copy.blocks[i] = *next++;
    base::store_be(bytes.data() + i * 8, copy.blocks[i]);
  }
  image_.file().write(table, bytes.io());
  // Both are metadata from now on, until one of them is forgotten.
  const TablePlace old = table_place();
  for (uint64_t i = 0; i < copy.clusters; ++i) {
    map_.add((old.offset >> bits) + i, kRefcountTable);
    map_.add((table >> bits) + i, kRefcountTable);
  }
  for (const uint64_t block : blocks) map_.add(block >> bits, kRefcountBlock);
  return exchange(std::move(copy));
}

Refcounts::Tables Refcounts::exchange(Tables other) {
  const std::lock_guard io(table_io_);
  const std::lock_guard lock(mutex_);
  std::swap(table_offset_, other.offset);
  std::swap(table_clusters_, other.clusters);
  std::swap(table_, other.blocks);
  std::swap(dirty_table_, other.dirty);
  map_.move_refcount_table(table_offset_ >> image_.geometry().cluster_bits, table_clusters_);
  return other;
}

void Refcounts::forget(const Tables& other) noexcept {
  const uint64_t cluster_size = image_.geometry().cluster_size();
  const unsigned bits = image_.geometry().cluster_bits;
  for (const uint64_t block : other.blocks) {
    if (block == 0) continue;
    map_.remove(block >> bits);
    cache_.drop(block, cluster_size);
  }
  for (uint64_t i = 0; i < other.clusters; ++i) {
    map_.remove((other.offset >> bits) + i);
    // The one in use is known by its place.
    map_.remove((table_offset_ >> bits) + i);
  }
}

}  // namespace minivmm::block::qcow2
