// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets on NBD's two sides share: the input, piece by piece, and messages.
#pragma once

#include <string_view>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "base/bytes.h"
#include "tests/fuzz/fuzz_input.h"

namespace minivmm::nbd {

// Of a WRITE that is sent with its data.
inline constexpr uint32_t kMaxPayload = 128 << 10;

using fuzz::Input;

// Puts messages together.
class Message {
 public:
  template <typename T>
  Message& number(T value) {
    const size_t at = bytes_.size();
    bytes_.resize(at + sizeof value);
    base::store_be(bytes_.data() + at, value);
    return *this;
  }
  Message& raw(std::span<const uint8_t> bytes) {
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
    return *this;
  }
  Message& text(std::string_view text) {
    number(static_cast<uint32_t>(text.size()));
    bytes_.insert(bytes_.end(), text.begin(), text.end());
    return *this;
  }
  Message& fill(size_t n) {
    bytes_.resize(bytes_.size() + n, uint8_t{0xa5});
    return *this;
  }
  Message& option(uint32_t option, const Message& data, int bias = 0) {
    const auto length = static_cast<uint32_t>(static_cast<int64_t>(data.bytes_.size()) + bias);
    return number(uint64_t{0x49484156454f5054}).number(option).number(length).raw(data.bytes_);
  }
  Message& request(uint16_t type, uint16_t flags, uint64_t cookie, uint64_t offset,
                   uint32_t length) {
    number(uint32_t{0x25609513}).number(flags).number(type);
    number(cookie).number(offset).number(length);
    return type == 1 && length <= kMaxPayload ? fill(length) : *this;
  }
  Message& long_request(uint16_t type, uint16_t flags, uint64_t cookie, uint64_t offset,
                        uint64_t length) {
    number(uint32_t{0x21e41c71}).number(flags).number(type);
    return number(cookie).number(offset).number(length);
  }
  std::span<const uint8_t> bytes() const { return bytes_; }

 private:
  std::vector<uint8_t> bytes_;
};

}  // namespace minivmm::nbd
