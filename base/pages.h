// SPDX-License-Identifier: Apache-2.0
// Memory of whole pages straight from the system, which has them back as soon as they are gone; the
// heap keeps what lies below something that lives longer. For buffers that are large, or kept and
// used again; less than a page does come from the heap. Move-only; contents start undefined.
#pragma once

#include <cstddef>
#include <utility>

namespace minivmm::base {

class Pages {
 public:
  Pages() = default;
  // Throws std::bad_alloc. Sizes that come from outside are bounded by the caller first.
  explicit Pages(size_t size);
  Pages(Pages&& o) noexcept
      : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}
  Pages& operator=(Pages&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    return *this;
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  ~Pages();

  std::byte* data() noexcept { return data_; }
  const std::byte* data() const noexcept { return data_; }
  size_t size() const noexcept { return size_; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace minivmm::base
