// SPDX-License-Identifier: Apache-2.0
// Payload buffers of one loop, by powers of two, shared by its connections: a request takes one
// and an idle connection holds none. The loop's thread only. What is kept is bounded; the newest
// is handed out first, while it is still in the processor's cache.
//
// What pools keep is beside what requests were charged for. Where both together are more than there
// may be, a pool that has to ask the system for memory has all of them give theirs back.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/pages.h"

namespace minivmm::nbd {

// What the pools of all loops keep. Any thread; outlives the pools.
class KeptBuffers {
 public:
  // Not worth any trouble.
  static constexpr uint64_t kAlways = uint64_t{4} << 20;
  static constexpr uint64_t kMost = uint64_t{32} << 20;

  void add(uint64_t bytes) noexcept { bytes_.fetch_add(bytes, std::memory_order_relaxed); }
  void remove(uint64_t bytes) noexcept { bytes_.fetch_sub(bytes, std::memory_order_relaxed); }
  uint64_t bytes() const noexcept { return bytes_.load(std::memory_order_relaxed); }

  // True if what pools keep has to go.
  virtual bool too_much() const noexcept = 0;
  // Has every pool trim() on its own thread, soon.
  virtual void trim_all() noexcept = 0;

 protected:
  ~KeptBuffers() = default;

 private:
  std::atomic<uint64_t> bytes_{0};
};

class BufferPool {
 public:
  static constexpr size_t kSmallest = 4096;
  static constexpr size_t kMaxKept = size_t{16} << 20;

  explicit BufferPool(KeptBuffers& all) noexcept : all_(all) {}
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;
  ~BufferPool() { trim(); }

  // What take() brings for so many bytes.
  static constexpr size_t room_for(size_t size) noexcept {
    return size == 0 ? 0 : std::bit_ceil(std::max(size, kSmallest));
  }
  // At least `size` bytes, aligned to 4096; the content is undefined. Throws std::bad_alloc.
  base::Pages take(size_t size);
  void give_back(base::Pages buffer) noexcept;

  // Gives what is kept back to the system.
  void trim() noexcept;
  // The same with as much as has not been needed since it was called last, if that is much.
  void shrink() noexcept;

  size_t kept() const noexcept { return kept_; }

 private:
  // The shared count is brought up to date in such steps.
  static constexpr size_t kStep = size_t{256} << 10;

  static constexpr size_t kClasses = 14;  // 4 KiB to 32 MiB
  static size_t class_of(size_t size) noexcept;
  void count() noexcept;

  KeptBuffers& all_;
  std::array<std::vector<base::Pages>, kClasses> free_;
  size_t kept_ = 0;     // bytes in free_
  size_t unused_ = 0;   // of these, since the last shrink(): what was there all the time
  size_t counted_ = 0;  // of kept_, in the shared count: up to a step more or less
};

}  // namespace minivmm::nbd
