// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/deflate/match_finder.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace minivmm::block::qcow2::deflate {
namespace {

uint32_t load32(const std::byte* at) {
  uint32_t out;
  std::memcpy(&out, at, sizeof(out));
  return out;
}

uint64_t load64(const std::byte* at) {
  uint64_t out;
  std::memcpy(&out, at, sizeof(out));
  return out;
}

// How many bytes are the same, of which `same` are known to be.
uint32_t common(const std::byte* a, const std::byte* b, uint32_t same, uint32_t most) {
  for (; same + 8 <= most; same += 8) {
    const uint64_t differ = load64(a + same) ^ load64(b + same);
    if (differ == 0) continue;
    const int zeroes = std::endian::native == std::endian::little ? std::countr_zero(differ)
                                                                  : std::countl_zero(differ);
    return same + static_cast<uint32_t>(zeroes) / 8;
  }
  while (same < most && a[same] == b[same]) ++same;
  return same;
}

}  // namespace

void MatchFinder::begin(std::span<const std::byte> data) {
  data_ = data.data();
  size_ = static_cast<uint32_t>(data.size());
  // Not for safety: the result depends on the data alone.
  last3_.fill(0);
  last4_.fill(0);
  before_.fill(0);
}

Match MatchFinder::find(uint32_t at, uint32_t longer_than, unsigned depth, uint32_t nice) {
  if (size_ - at < 4) return {};
  const std::byte* const here = data_ + at;
  const uint32_t word = load32(here);
  uint16_t& last3 = last3_[hash3(word)];
  uint16_t& last4 = last4_[hash4(word)];
  const uint32_t distance3 = static_cast<uint16_t>(at - last3);
  uint32_t candidate = last4;
  last3 = static_cast<uint16_t>(at);
  last4 = static_cast<uint16_t>(at);
  before_[at % kChain] = static_cast<uint16_t>(candidate);

  const uint32_t most = std::min(size_ - at, kMaxMatch);
  Match best{longer_than, 0};
  if (best.length < kMinMatch && distance3 != 0 && distance3 <= std::min(at, kMaxDistance) &&
      ((load32(here - distance3) ^ word) & 0xFFFFFF) == 0) {
    best = {kMinMatch, distance3};
  }
  nice = std::min(nice, most);
  uint32_t nearer = 0;
  for (; depth > 0; --depth) {
    const uint32_t distance = static_cast<uint16_t>(at - candidate);
    // Each is farther than the one before, unless its place in the chain was used again.
    if (distance <= nearer || distance > kMaxDistance || distance > at) break;
    nearer = distance;
    const std::byte* const there = here - distance;
    // A longer one is the same in its last bytes, too.
    if (load32(there) == word &&
        (best.length < 4 || best.length >= most ||
         load32(there + best.length - 3) == load32(here + best.length - 3))) {
      const uint32_t length = common(here, there, 4, most);
      if (length > best.length) {
        best = {length, distance};
        if (length >= nice) break;
      }
    }
    candidate = before_[(at - distance) % kChain];
  }
  return best.distance == 0 ? Match{} : best;
}

void MatchFinder::skip(uint32_t at, uint32_t count) {
  for (; count > 0 && size_ - at >= 4; --count, ++at) {
    const uint32_t word = load32(data_ + at);
    last3_[hash3(word)] = static_cast<uint16_t>(at);
    uint16_t& last4 = last4_[hash4(word)];
    before_[at % kChain] = last4;
    last4 = static_cast<uint16_t>(at);
  }
}

}  // namespace minivmm::block::qcow2::deflate
