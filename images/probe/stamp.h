// SPDX-License-Identifier: Apache-2.0
// What the probe guest writes into a block, so that whoever reads it later can tell who wrote it,
// with which request, and whether it is whole. Pure, freestanding: the guest and the tests on the
// host use this same file.
//
// One stamp fills one 512-byte sector, as 64 little-endian words:
//
//   word 0      magic "MVSTAMP1"
//   word 1      byte offset on the disk of this sector
//   word 2      sequence number of the request that wrote it, from 1
//   word 3      writer in the low 32 bits, seed in the high 32 bits
//   word 4-62   filler: mix(words 1, 2, 3 and the word's index)
//   word 63     check: sum of words 0 to 62, each rotated by its index
//
// A sector whose check fails, or that lies at another offset than word 1 says, is damaged or torn.
#pragma once

#include <cstddef>
#include <cstdint>

namespace minivmm::probe {

inline constexpr size_t kSectorBytes = 512;
inline constexpr size_t kStampWords = kSectorBytes / 8;
inline constexpr uint64_t kStampMagic = 0x31504d415453564d;  // "MVSTAMP1"

// A bijection on 64 bits in which every input bit reaches every output bit (splitmix64's finish).
constexpr uint64_t mix64(uint64_t v) noexcept {
  v += 0x9e3779b97f4a7c15;
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9;
  v = (v ^ (v >> 27)) * 0x94d049bb133111eb;
  return v ^ (v >> 31);
}

constexpr uint64_t rotate_left(uint64_t v, unsigned n) noexcept {
  return (v << (n & 63)) | (v >> ((64 - n) & 63));
}

struct Stamp {
  uint64_t offset = 0;
  uint64_t sequence = 0;
  uint32_t writer = 0;
  uint32_t seed = 0;

  constexpr bool operator==(const Stamp&) const noexcept = default;
};

constexpr void fill_stamp(uint64_t* words, const Stamp& stamp) noexcept {
  words[0] = kStampMagic;
  words[1] = stamp.offset;
  words[2] = stamp.sequence;
  words[3] = (uint64_t{stamp.seed} << 32) | stamp.writer;
  uint64_t filler = mix64(words[1] ^ mix64(words[2] ^ mix64(words[3])));
  uint64_t check = 0;
  for (unsigned i = 0; i < 4; ++i) check += rotate_left(words[i], i);
  for (unsigned i = 4; i < kStampWords - 1; ++i) {
    filler = filler * 0xd1342543de82ef95 + 1;
    words[i] = filler;
    check += rotate_left(filler, i);
  }
  words[kStampWords - 1] = check;
}

enum class SectorKind {
  kStamp,    // whole, and where it belongs
  kZero,     // all zero
  kForeign,  // no stamp: somebody else's data
  kDamaged,  // a stamp that is torn, changed or in the wrong place
};

// Classifies the sector that was read from `offset`; `*out` is set for kStamp.
constexpr SectorKind read_stamp(const uint64_t* words, uint64_t offset, Stamp* out) noexcept {
  if (words[0] != kStampMagic) {
    bool zero = true;
    for (unsigned i = 0; i < kStampWords && zero; ++i) zero = words[i] == 0;
    return zero ? SectorKind::kZero : SectorKind::kForeign;
  }
  const Stamp stamp{words[1], words[2], static_cast<uint32_t>(words[3]),
                    static_cast<uint32_t>(words[3] >> 32)};
  if (stamp.offset != offset) return SectorKind::kDamaged;
  uint64_t expected[kStampWords] = {};
  fill_stamp(expected, stamp);
  for (unsigned i = 0; i < kStampWords; ++i) {
    if (words[i] != expected[i]) return SectorKind::kDamaged;
  }
  *out = stamp;
  return SectorKind::kStamp;
}

}  // namespace minivmm::probe
