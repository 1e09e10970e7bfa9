// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/base64.h"

#include <cstdint>
#include <span>

namespace minivmm::block::crypto {
namespace {

constexpr std::string_view kAlphabet =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

}  // namespace

std::optional<SecureBytes> decode_base64(std::string_view text) {
  SecureBytes all(text.size() / 4 * 3 + 3);
  size_t length = 0;
  uint32_t group = 0;
  unsigned digits = 0;
  unsigned padding = 0;
  for (const char c : text) {
    if (c == '\n' || c == '\r') continue;
    if (c == '=') {
      if (++padding > 2) return std::nullopt;
      group <<= 6;
    } else {
      const size_t value = kAlphabet.find(c);
      if (value == std::string_view::npos || padding != 0) return std::nullopt;
      group = group << 6 | static_cast<uint32_t>(value);
    }
    if (++digits < 4) continue;
    for (unsigned i = 0; i + padding < 3; ++i) {
      all.data()[length++] = static_cast<std::byte>(group >> (16 - 8 * i) & 0xff);
    }
    digits = 0;
    group = 0;
  }
  if (digits != 0) return std::nullopt;
  return SecureBytes(std::span<const std::byte>(all.span()).first(length));
}

}  // namespace minivmm::block::crypto
