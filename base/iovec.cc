// SPDX-License-Identifier: Apache-2.0
#include "base/iovec.h"

#include <algorithm>
#include <cassert>

namespace minivmm::base {

void IoList::grow() {
  const size_t bigger = capacity_ * 4;
  auto heap = std::make_unique<iovec[]>(bigger);
  std::copy_n(data(), count_, heap.get());
  heap_ = std::move(heap);
  capacity_ = bigger;
}

void IoList::add(void* buffer, size_t length) {
  if (length == 0) return;
  if (count_ == capacity_) grow();
  data()[count_++] = {buffer, length};
  bytes_ += length;
}

void IoList::add(IoSpan span) {
  for (const iovec& v : span.list()) add(v.iov_base, v.iov_len);
}

void IoList::add_slice(IoSpan span, uint64_t skip, uint64_t length) {
  assert(skip <= span.bytes() && length <= span.bytes() - skip);
  for (const iovec& v : span.list()) {
    if (length == 0) return;
    if (skip >= v.iov_len) {
      skip -= v.iov_len;
      continue;
    }
    const size_t piece = std::min<uint64_t>(v.iov_len - skip, length);
    add(static_cast<char*>(v.iov_base) + skip, piece);
    skip = 0;
    length -= piece;
  }
}

IoSpan slice(IoSpan span, uint64_t skip, uint64_t length, IoList& storage) {
  if (skip == 0 && length == span.bytes()) return span;
  storage.clear();
  storage.add_slice(span, skip, length);
  return storage;
}

namespace {

// Calls f(piece of the span) for each piece of bytes [skip, skip + length).
template <typename F>
size_t for_each_piece(IoSpan span, uint64_t skip, uint64_t length, F&& f) noexcept {
  size_t done = 0;
  for (const iovec& v : span.list()) {
    if (done == length) break;
    if (skip >= v.iov_len) {
      skip -= v.iov_len;
      continue;
    }
    const size_t piece = std::min<uint64_t>(v.iov_len - skip, length - done);
    f(static_cast<char*>(v.iov_base) + skip, piece, done);
    skip = 0;
    done += piece;
  }
  return done;
}

}  // namespace

size_t copy_from(IoSpan from, uint64_t skip, std::span<std::byte> to) noexcept {
  return for_each_piece(from, skip, to.size(), [&](char* p, size_t n, size_t done) {
    std::memcpy(to.data() + done, p, n);
  });
}

size_t copy_to(IoSpan to, uint64_t skip, std::span<const std::byte> from) noexcept {
  return for_each_piece(to, skip, from.size(), [&](char* p, size_t n, size_t done) {
    std::memcpy(p, from.data() + done, n);
  });
}

void fill_zero(IoSpan span, uint64_t skip, uint64_t length) noexcept {
  for_each_piece(span, skip, length, [](char* p, size_t n, size_t) { std::memset(p, 0, n); });
}

bool is_zero(std::span<const std::byte> bytes) noexcept {
  const char* p = reinterpret_cast<const char*>(bytes.data());
  size_t n = bytes.size();
  while (n >= 64) {
    uint64_t w[8];
    std::memcpy(w, p, sizeof w);
    if ((w[0] | w[1] | w[2] | w[3] | w[4] | w[5] | w[6] | w[7]) != 0) return false;
    p += 64, n -= 64;
  }
  for (; n > 0; ++p, --n) {
    if (*p != 0) return false;
  }
  return true;
}

}  // namespace minivmm::base
