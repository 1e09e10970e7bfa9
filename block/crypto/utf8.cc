// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/utf8.h"

#include <cstdint>

namespace minivmm::block::crypto {
namespace {

// The length of the character that begins with this byte, 0 if none does.
size_t length_of(unsigned first) noexcept {
  if (first == 0) return 0;
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first < 0xe0) return 2;
  if (first >= 0xe0 && first < 0xf0) return 3;
  if (first >= 0xf0 && first < 0xf5) return 4;
  return 0;
}

}  // namespace

bool is_utf8(std::span<const std::byte> bytes) noexcept {
  for (size_t at = 0; at < bytes.size();) {
    const auto first = std::to_integer<unsigned>(bytes[at]);
    const size_t length = length_of(first);
    if (length == 0 || length > bytes.size() - at) return false;
    uint32_t character = length == 1 ? first : first & (0x7fU >> length);
    for (size_t i = 1; i < length; ++i) {
      const auto next = std::to_integer<unsigned>(bytes[at + i]);
      if ((next & 0xc0) != 0x80) return false;
      character = character << 6 | (next & 0x3f);
    }
    const bool overlong =
        (length == 3 && character < 0x800) || (length == 4 && character < 0x10000);
    const bool surrogate = character >= 0xd800 && character < 0xe000;
    if (overlong || surrogate || character > 0x10ffff) return false;
    at += length;
  }
  return true;
}

}  // namespace minivmm::block::crypto
