// SPDX-License-Identifier: Apache-2.0
// Bytes that are wiped when they are given up: keys, passwords, what keys are made of. Move-only,
// so that copies are seen in the code.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <utility>

namespace minivmm::block::crypto {

// Not optimised away, as a memset before the memory is freed is.
inline void wipe(std::span<std::byte> bytes) noexcept {
  if (!bytes.empty()) ::explicit_bzero(bytes.data(), bytes.size());
}

// Takes the same time wherever the two differ.
inline bool same_bytes(std::span<const std::byte> a, std::span<const std::byte> b) noexcept {
  if (a.size() != b.size()) return false;
  unsigned difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference |= std::to_integer<unsigned>(a[i] ^ b[i]);
  return difference == 0;
}

class SecureBytes {
 public:
  SecureBytes() = default;
  // Zeroes. Sizes that come from outside are bounded by the caller.
  explicit SecureBytes(size_t size) : data_(std::make_unique<std::byte[]>(size)), size_(size) {}
  explicit SecureBytes(std::span<const std::byte> bytes) : SecureBytes(bytes.size()) {
    if (!bytes.empty()) std::memcpy(data_.get(), bytes.data(), bytes.size());
  }
  SecureBytes(SecureBytes&& o) noexcept
      : data_(std::move(o.data_)), size_(std::exchange(o.size_, 0)) {}
  SecureBytes& operator=(SecureBytes&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(size_, o.size_);
    return *this;
  }
  ~SecureBytes() { wipe(span()); }

  size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }
  std::byte* data() noexcept { return data_.get(); }
  const std::byte* data() const noexcept { return data_.get(); }
  std::span<std::byte> span() noexcept { return {data_.get(), size_}; }
  std::span<const std::byte> span() const noexcept { return {data_.get(), size_}; }

 private:
  std::unique_ptr<std::byte[]> data_;
  size_t size_ = 0;
};

}  // namespace minivmm::block::crypto
