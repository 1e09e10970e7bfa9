// SPDX-License-Identifier: Apache-2.0
// Heap buffers aligned for O_DIRECT (4096 bytes). Move-only; contents start undefined unless asked.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <span>
#include <utility>

#include "base/checked.h"
#include "base/iovec.h"

namespace minivmm::base {

inline constexpr size_t kBufferAlignment = 4096;

class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc. Sizes that come from outside are bounded by the caller first.
  explicit Buffer(size_t size)
      : data_(static_cast<std::byte*>(std::aligned_alloc(
            size < kBufferAlignment ? 512 : kBufferAlignment,
            align_up<size_t>(size == 0 ? 1 : size,
                             size < kBufferAlignment ? 512 : kBufferAlignment)))),
        size_(size) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  static Buffer zeroed(size_t size) {
    Buffer out(size);
    std::memset(out.data(), 0, size);
    return out;
  }
  Buffer(Buffer&& o) noexcept
      : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  std::byte* data() noexcept { return data_; }
  const std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }
  std::span<std::byte> span() noexcept { return {data_, size_}; }
  std::span<const std::byte> span() const noexcept { return {data_, size_}; }
  SingleBuffer io() noexcept { return {data_, size_}; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace minivmm::base
