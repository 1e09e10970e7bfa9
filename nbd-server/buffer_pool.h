// SPDX-License-Identifier: Apache-2.0
// Payload buffers of one loop, by powers of two, shared by its connections: a request takes one
// and an idle connection holds none. The loop's thread only. What is kept is bounded; the newest
// is handed out first, while it is still in the processor's cache.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "base/buffer.h"

namespace minivmm::nbd {

class BufferPool {
 public:
  static constexpr size_t kSmallest = 4096;
  static constexpr size_t kMaxKept = size_t{16} << 20;

  // At least `size` bytes, aligned to 4096; the content is undefined. Throws std::bad_alloc.
  base::Buffer take(size_t size);
  void give_back(base::Buffer buffer) noexcept;

  size_t kept() const noexcept { return kept_; }

 private:
  static constexpr size_t kClasses = 14;  // 4 KiB to 32 MiB
  static size_t class_of(size_t size) noexcept;

  std::array<std::vector<base::Buffer>, kClasses> free_;
  size_t kept_ = 0;  // bytes in free_
};

}  // namespace minivmm::nbd
