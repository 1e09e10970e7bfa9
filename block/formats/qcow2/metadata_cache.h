// SPDX-License-Identifier: Apache-2.0
// A cache of slices of metadata clusters (L2 tables or refcount blocks), keyed by their offset in
// the file, holding them as they are on disk.
//
// Owned by Image. Any loop. Each shard has a plain mutex under which a visitor looks at or changes
// a slice; nothing suspends inside, so a cached slice is never waited for. A slice that is not
// cached is read by the first fiber that wants it; the others wait for that read.
//
// Slices that were changed stay until a commit has written them: take_dirty() gives copies, and
// the slices are kept until written() or failed() says how it went. Clean slices give way by the
// clock algorithm, a capacity for each shard.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/buffer.h"
#include "base/wait_queue.h"
#include "block/formats/qcow2/image_file.h"

namespace minivmm::block::qcow2 {

class MetadataCache {
 public:
  // `what` names the contents in messages: "L2 table". `slice_size`: a power of two of at least
  // 512 that divides the cluster size.
  MetadataCache(ImageFile& image, const char* what, uint32_t slice_size, uint64_t capacity);
  MetadataCache(const MetadataCache&) = delete;
  MetadataCache& operator=(const MetadataCache&) = delete;

  uint32_t slice_size() const noexcept { return slice_size_; }

  // Calls visitor(const std::byte* slice) under the shard's lock. `offset` is the slice's: a
  // multiple of slice_size. Fiber. Throws what reading the slice throws; EIO if it lies past the
  // end of the file.
  template <typename Visitor>
  void read(uint64_t offset, Visitor&& visitor) {
    visit(offset, [&](Slice& slice, Shard&) {
      visitor(static_cast<const std::byte*>(slice.bytes.data()));
    });
  }

  // The same for a slice that is in the cache; false: it is not. Does not wait.
  template <typename Visitor>
  bool read_cached(uint64_t offset, Visitor&& visitor) {
    return visit_cached(shard_of(offset), offset, [&](Slice& slice, Shard&) {
      visitor(static_cast<const std::byte*>(slice.bytes.data()));
    });
  }

  // The same for changing it: bool visitor(std::byte* slice) returns whether it did.
  template <typename Visitor>
  void change(uint64_t offset, Visitor&& visitor) {
    visit(offset, [&](Slice& slice, Shard& shard) {
      if (visitor(slice.bytes.data())) mark_dirty(shard, slice);
    });
  }

  // Forgets the slices of a cluster that has been freed and that no request can know any more.
  void drop(uint64_t cluster_offset, uint64_t cluster_size);

  // Bytes that wait for a commit, and whether that is so much that writers should do one now.
  uint64_t dirty_bytes() const noexcept { return dirty_bytes_.load(std::memory_order_relaxed); }
  bool under_pressure() const noexcept { return dirty_bytes() > capacity_ / 2; }

  // --- The commit; one at a time ---
  struct Copy {
    uint64_t offset;
    base::Buffer bytes;
  };
  std::vector<Copy> take_dirty();
  void written(const std::vector<Copy>& copies) noexcept;
  void failed(const std::vector<Copy>& copies);

  // For state dumps and tests.
  struct Stats {
    uint64_t bytes = 0;
    uint64_t capacity = 0;
    uint64_t loads = 0;
  };
  Stats stats() const;

 private:
  struct Slice {
    uint64_t offset = 0;
    base::Buffer bytes;
    bool ready = false;       // false: being read
    bool dirty = false;       // changed since it was last copied for a commit
    bool writing = false;     // a commit is writing a copy
    bool referenced = false;  // visited since the clock's hand went by
    uint32_t clock_index = 0;
  };
  struct alignas(64) Shard {
    mutable std::mutex mutex;
    base::WaitQueue loaded;
    std::unordered_map<uint64_t, std::unique_ptr<Slice>> slices;
    std::vector<Slice*> clock;
    std::vector<Slice*> dirty;
    size_t hand = 0;
    uint64_t loads = 0;
  };

  template <typename Visitor>
  void visit(uint64_t offset, Visitor&& visitor) {
    Shard& shard = shard_of(offset);
    while (!visit_cached(shard, offset, visitor)) load(shard, offset);
  }

  template <typename Visitor>
  bool visit_cached(Shard& shard, uint64_t offset, Visitor&& visitor) {
    const std::lock_guard lock(shard.mutex);
    const auto it = shard.slices.find(offset);
    if (it == shard.slices.end() || !it->second->ready) return false;
    it->second->referenced = true;
    visitor(*it->second, shard);
    return true;
  }

  Shard& shard_of(uint64_t offset) noexcept {
    const uint64_t hash = (offset >> slice_bits_) * 0x9e3779b97f4a7c15ULL;
    return shards_[(hash >> 32) & shard_mask_];
  }
  void load(Shard& shard, uint64_t offset);
  void read_slice(uint64_t offset, base::Buffer& to);
  void mark_dirty(Shard& shard, Slice& slice);
  void make_room(Shard& shard);
  void erase(Shard& shard, Slice& slice) noexcept;

  ImageFile& image_;
  const char* const what_;
  const uint32_t slice_size_;
  const unsigned slice_bits_;
  const uint64_t capacity_;
  uint64_t shard_mask_ = 0;
  size_t slices_per_shard_ = 1;
  std::unique_ptr<Shard[]> shards_;
  std::atomic<uint64_t> dirty_bytes_{0};
};

}  // namespace minivmm::block::qcow2
