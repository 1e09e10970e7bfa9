// SPDX-License-Identifier: Apache-2.0
// Where the bytes at a position stood before, within 4 KiB: hash chains over the last 4095
// positions, which fit in a core's first cache with all that goes with them.
//
// What the tables say is a hint: every match is compared, so entries of bytes that are long gone
// need not be removed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace minivmm::block::qcow2::deflate {

// A reader that keeps 4 KiB of what it wrote knows no more.
inline constexpr uint32_t kMaxDistance = 4095;
inline constexpr uint32_t kMinMatch = 3;
inline constexpr uint32_t kMaxMatch = 258;

struct Match {
  uint32_t length = 0;  // 0: none
  uint32_t distance = 0;
};

class MatchFinder {
 public:
  // `data` stays until the last find().
  void begin(std::span<const std::byte> data);

  // The longest match at `at` that is longer than `longer_than`, looking at no more than `depth`
  // earlier positions, and content with `nice` bytes. Positions are asked for or skipped in order,
  // each once.
  Match find(uint32_t at, uint32_t longer_than, unsigned depth, uint32_t nice);
  void skip(uint32_t at, uint32_t count);

 private:
  static constexpr unsigned kHash3Bits = 12;
  static constexpr unsigned kHash4Bits = 14;
  static constexpr uint32_t kChain = kMaxDistance + 1;

  static uint32_t hash3(uint32_t word) { return ((word << 8) * 0x9E3779B1U) >> (32 - kHash3Bits); }
  static uint32_t hash4(uint32_t word) { return (word * 0x9E3779B1U) >> (32 - kHash4Bits); }

  const std::byte* data_ = nullptr;
  uint32_t size_ = 0;
  // Positions modulo 64 Ki.
  std::array<uint16_t, 1 << kHash3Bits> last3_;  // the last with a hash of three bytes
  std::array<uint16_t, 1 << kHash4Bits> last4_;
  std::array<uint16_t, kChain> before_;  // of each position: the one before with its hash of four
};

}  // namespace minivmm::block::qcow2::deflate
