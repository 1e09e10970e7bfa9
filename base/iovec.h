// SPDX-License-Identifier: Apache-2.0
// Scatter/gather lists: a borrowed view (IoSpan) and a small owning list for cutting one (IoList).
// The memory and the iovec array belong to the caller and stay valid until the call that was
// given the span returns.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>

namespace minivmm::base {

// A list of buffers and their total length in bytes. Cheap to copy.
class IoSpan {
 public:
  IoSpan() = default;
  IoSpan(const iovec* data, size_t count, uint64_t bytes) noexcept
      : data_(data), count_(count), bytes_(bytes) {}
  // Adds up the lengths.
  explicit IoSpan(std::span<const iovec> list) noexcept : data_(list.data()), count_(list.size()) {
    for (const iovec& v : list) bytes_ += v.iov_len;
  }

  const iovec* data() const noexcept { return data_; }
  size_t count() const noexcept { return count_; }
  uint64_t bytes() const noexcept { return bytes_; }
  std::span<const iovec> list() const noexcept { return {data_, count_}; }

 private:
  const iovec* data_ = nullptr;
  size_t count_ = 0;
  uint64_t bytes_ = 0;
};

// One buffer as an IoSpan; lives as long as the call that it is passed to.
class SingleBuffer {
 public:
  SingleBuffer(void* data, size_t length) noexcept : iov_{data, length} {}
  explicit SingleBuffer(std::span<std::byte> bytes) noexcept : iov_{bytes.data(), bytes.size()} {}
  // For writes: the driver never stores into a write's buffers.
  SingleBuffer(const void* data, size_t length) noexcept : iov_{const_cast<void*>(data), length} {}
  explicit SingleBuffer(std::span<const std::byte> bytes) noexcept
      : SingleBuffer(static_cast<const void*>(bytes.data()), bytes.size()) {}
  operator IoSpan() const noexcept { return {&iov_, 1, iov_.iov_len}; }

 private:
  iovec iov_;
};

// A list of buffers that is being put together: pieces of other spans, bounce buffers. Up to
// kInline entries without an allocation.
class IoList {
 public:
  static constexpr size_t kInline = 8;

  IoList() = default;
  IoList(const IoList&) = delete;
  IoList& operator=(const IoList&) = delete;

  void add(void* data, size_t length);
  void add(IoSpan span);
  // Appends bytes [skip, skip + length) of `span`; the range must lie inside it.
  void add_slice(IoSpan span, uint64_t skip, uint64_t length);
  void clear() noexcept { count_ = 0, bytes_ = 0; }

  uint64_t bytes() const noexcept { return bytes_; }
  size_t count() const noexcept { return count_; }
  iovec* data() noexcept { return heap_ ? heap_.get() : inline_; }
  operator IoSpan() noexcept { return {data(), count_, bytes_}; }

 private:
  void grow();

  iovec inline_[kInline];
  std::unique_ptr<iovec[]> heap_;
  size_t count_ = 0;
  size_t capacity_ = kInline;
  uint64_t bytes_ = 0;
};

// Bytes [skip, skip + length) of `span`. A range that covers it all is `span` itself, with no
// copy; otherwise `storage` holds the pieces.
IoSpan slice(IoSpan span, uint64_t skip, uint64_t length, IoList& storage);

// Copies as many bytes as both sides hold; returns how many.
size_t copy_from(IoSpan from, uint64_t skip, std::span<std::byte> to) noexcept;
size_t copy_to(IoSpan to, uint64_t skip, std::span<const std::byte> from) noexcept;
void fill_zero(IoSpan span, uint64_t skip, uint64_t length) noexcept;

// True if every byte is zero. Reads each byte once; vectorised.
bool is_zero(std::span<const std::byte> bytes) noexcept;

}  // namespace minivmm::base
