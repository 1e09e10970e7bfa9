// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/metadata_cache.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include <fmt/core.h>

#include "base/checked.h"

namespace minivmm::block::qcow2 {
namespace {

// Enough shards that loops rarely meet, few enough that each holds a useful number of slices.
uint64_t shard_count(uint64_t slices) { return slices >= 256 ? 16 : slices >= 64 ? 4 : 1; }

}  // namespace

MetadataCache::MetadataCache(ImageFile& image, const char* what, uint32_t slice_size,
                             uint64_t capacity)
    : image_(image),
      what_(what),
      slice_size_(slice_size),
      slice_bits_(static_cast<unsigned>(std::countr_zero(slice_size))),
      capacity_(std::max<uint64_t>(capacity, 2 * uint64_t{slice_size})) {
  const uint64_t slices = capacity_ / slice_size_;
  const uint64_t shards = shard_count(slices);
  shard_mask_ = shards - 1;
  slices_per_shard_ = static_cast<size_t>(slices / shards);
  shards_ = std::make_unique<Shard[]>(shards);
}

void MetadataCache::load(Shard& shard, uint64_t offset) {
  auto fresh = std::make_unique<Slice>();
  fresh->offset = offset;
  fresh->bytes = base::Buffer(slice_size_);
  Slice& slice = *fresh;
  {
    std::unique_lock lock(shard.mutex);
    const auto it = shard.slices.find(offset);
    if (it != shard.slices.end()) {
      if (!it->second->ready) shard.loaded.wait(lock, "a metadata slice that is being read");
      return;
    }
    make_room(shard);
    slice.clock_index = static_cast<uint32_t>(shard.clock.size());
    shard.clock.push_back(&slice);
    shard.slices.emplace(offset, std::move(fresh));
    ++shard.loads;
  }
  // While it is not ready nobody else touches the slice's bytes, and nobody erases it.
  std::exception_ptr error;
  try {
    read_slice(offset, slice.bytes);
  } catch (...) {
    error = std::current_exception();
  }
  const std::lock_guard lock(shard.mutex);
  if (error) {
    erase(shard, slice);
  } else {
    slice.ready = true;
    slice.referenced = true;
  }
  shard.loaded.notify_all();
  if (error) std::rethrow_exception(error);
}

void MetadataCache::read_slice(uint64_t offset, base::Buffer& to) {
  if (!base::range_fits(offset, slice_size_, image_.size())) {
    throw image_.corruption(fmt::format("{} at {:#x} lies past the end of the file ({} bytes)",
                                        what_, offset, image_.size()));
  }
  image_.file().read(offset, to.io());
}

void MetadataCache::mark_dirty(Shard& shard, Slice& slice) {
  if (slice.dirty) return;
  shard.dirty.push_back(&slice);
  slice.dirty = true;
  dirty_bytes_.fetch_add(slice_size_, std::memory_order_relaxed);
}

void MetadataCache::make_room(Shard& shard) {
  // Two turns at most: the first takes the referenced marks away. If all are dirty or in use, the
  // shard grows past its share; dirty_bytes() then makes writers commit.
  size_t steps = shard.clock.size() * 2;
  while (shard.clock.size() >= slices_per_shard_ && steps-- > 0) {
    if (shard.hand >= shard.clock.size()) shard.hand = 0;
    Slice& slice = *shard.clock[shard.hand];
    if (!slice.ready || slice.dirty || slice.writing) {
      ++shard.hand;
    } else if (slice.referenced) {
      slice.referenced = false;
      ++shard.hand;
    } else {
      erase(shard, slice);
    }
  }
}

void MetadataCache::erase(Shard& shard, Slice& slice) noexcept {
  Slice* last = shard.clock.back();
  shard.clock[slice.clock_index] = last;
  last->clock_index = slice.clock_index;
  shard.clock.pop_back();
  shard.slices.erase(slice.offset);
}

void MetadataCache::drop(uint64_t cluster_offset, uint64_t cluster_size) {
  for (uint64_t at = cluster_offset; at < cluster_offset + cluster_size; at += slice_size_) {
    Shard& shard = shard_of(at);
    const std::lock_guard lock(shard.mutex);
    const auto it = shard.slices.find(at);
    if (it == shard.slices.end() || !it->second->ready || it->second->writing) continue;
    if (it->second->dirty) {
      std::erase(shard.dirty, it->second.get());
      dirty_bytes_.fetch_sub(slice_size_, std::memory_order_relaxed);
    }
    erase(shard, *it->second);
  }
}

std::vector<MetadataCache::Copy> MetadataCache::take_dirty() {
  std::vector<Copy> out;
  for (uint64_t i = 0; i <= shard_mask_; ++i) {
    Shard& shard = shards_[i];
    size_t expected = 0;
    {
      const std::lock_guard lock(shard.mutex);
      expected = shard.dirty.size();
    }
    // Buffers are made outside the lock; a few changes more than were counted wait for the next
    // turn of the loop.
    std::vector<Copy> copies(expected);
    for (Copy& copy : copies) copy.bytes = base::Buffer(slice_size_);
    size_t used = 0;
    {
      const std::lock_guard lock(shard.mutex);
      if (shard.dirty.size() > expected) {
        for (size_t more = shard.dirty.size() - expected; more > 0; --more) {
          copies.push_back({0, base::Buffer(slice_size_)});
        }
      }
      for (Slice* slice : shard.dirty) {
        Copy& copy = copies[used++];
        copy.offset = slice->offset;
        std::memcpy(copy.bytes.data(), slice->bytes.data(), slice_size_);
        slice->dirty = false;
        slice->writing = true;
      }
      shard.dirty.clear();
    }
    dirty_bytes_.fetch_sub(used * slice_size_, std::memory_order_relaxed);
    copies.resize(used);
    for (Copy& copy : copies) out.push_back(std::move(copy));
  }
  std::sort(out.begin(), out.end(),
            [](const Copy& a, const Copy& b) { return a.offset < b.offset; });
  return out;
}

void MetadataCache::written(const std::vector<Copy>& copies) noexcept {
  for (const Copy& copy : copies) {
    Shard& shard = shard_of(copy.offset);
    const std::lock_guard lock(shard.mutex);
    shard.slices.find(copy.offset)->second->writing = false;
  }
}

void MetadataCache::failed(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    Shard& shard = shard_of(copy.offset);
    const std::lock_guard lock(shard.mutex);
    Slice& slice = *shard.slices.find(copy.offset)->second;
    slice.writing = false;
    mark_dirty(shard, slice);
  }
}

MetadataCache::Stats MetadataCache::stats() const {
  Stats out;
  out.capacity = capacity_;
  for (uint64_t i = 0; i <= shard_mask_; ++i) {
    const std::lock_guard lock(shards_[i].mutex);
    out.bytes += shards_[i].clock.size() * slice_size_;
    out.loads += shards_[i].loads;
  }
  return out;
}

}  // namespace minivmm::block::qcow2
