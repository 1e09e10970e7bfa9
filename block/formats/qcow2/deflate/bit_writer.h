// SPDX-License-Identifier: Apache-2.0
// Bits to bytes, the lowest first, as deflate has them. The caller has made sure that there is
// room.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace minivmm::block::qcow2::deflate {

class BitWriter {
 public:
  explicit BitWriter(std::span<std::byte> out) : out_(out) {}

  // At most 48 bits; `value` has no others.
  void put(uint64_t value, unsigned bits) {
    if (count_ + bits >= 64) flush();
    pending_ |= value << count_;
    count_ += bits;
  }
  // Up to the next byte.
  void align() {
    count_ = (count_ + 7) / 8 * 8;
    flush();
  }
  // After align().
  void bytes(std::span<const std::byte> from) {
    std::memcpy(out_.data() + used_, from.data(), from.size());
    used_ += from.size();
  }

  uint64_t bits_used() const { return used_ * 8 + count_; }
  uint64_t bits_left() const { return out_.size() * 8 - bits_used(); }

 private:
  // Whole bytes.
  void flush() {
    const unsigned bytes = count_ / 8;
    if (std::endian::native == std::endian::little && out_.size() - used_ >= 8) {
      std::memcpy(out_.data() + used_, &pending_, 8);
    } else {
      for (unsigned i = 0; i < bytes; ++i) {
        out_[used_ + i] = static_cast<std::byte>(pending_ >> 8 * i);
      }
    }
    used_ += bytes;
    pending_ = bytes == 8 ? 0 : pending_ >> 8 * bytes;
    count_ -= 8 * bytes;
  }

  std::span<std::byte> out_;
  size_t used_ = 0;
  uint64_t pending_ = 0;
  unsigned count_ = 0;  // bits in pending_
};

}  // namespace minivmm::block::qcow2::deflate
