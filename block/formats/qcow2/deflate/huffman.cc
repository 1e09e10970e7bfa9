// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/deflate/huffman.h"

#include <algorithm>
#include <array>

namespace minivmm::block::qcow2::deflate {
namespace {

constexpr size_t kMostSymbols = 288;
constexpr unsigned kDeepest = 32;  // counts that add up to 2^17 make no deeper tree

// A count, and below it the symbol.
using Leaves = std::array<uint32_t, kMostSymbols>;
constexpr unsigned kSymbolBits = 9;

uint32_t symbol_of(uint32_t leaf) { return leaf % (1U << kSymbolBits); }
uint32_t count_of(uint32_t leaf) { return leaf >> kSymbolBits; }

// Leaves that occur, the rarest first.
size_t sorted_leaves(std::span<const uint32_t> counts, Leaves& leaves) {
  size_t n = 0;
  for (uint32_t symbol = 0; symbol < counts.size(); ++symbol) {
    if (counts[symbol] != 0) leaves[n++] = counts[symbol] << kSymbolBits | symbol;
  }
  for (uint32_t symbol = 0; n < 2; ++symbol) {
    if (counts[symbol] == 0) leaves[n++] = 1U << kSymbolBits | symbol;
  }
  std::sort(leaves.begin(), leaves.begin() + static_cast<long>(n));
  return n;
}

// How many leaves of the tree lie at each depth. The two lightest nodes are joined, again and
// again; joined nodes come out in order of weight, so two queues are all it takes.
void depths(const Leaves& leaves, size_t n, std::array<uint32_t, kDeepest + 1>& at_depth) {
  std::array<uint32_t, kMostSymbols> weight;      // of what was joined
  std::array<uint16_t, 2 * kMostSymbols> parent;  // leaves first, then what was joined
  size_t leaf = 0;
  size_t joined = 0;
  for (size_t made = 0; made + 1 < n; ++made) {
    uint32_t sum = 0;
    for (int child = 0; child < 2; ++child) {
      const bool take_leaf =
          leaf < n && (joined == made || count_of(leaves[leaf]) <= weight[joined]);
      if (take_leaf) {
        sum += count_of(leaves[leaf]);
        parent[leaf++] = static_cast<uint16_t>(made);
      } else {
        sum += weight[joined];
        parent[n + joined++] = static_cast<uint16_t>(made);
      }
    }
    weight[made] = sum;
  }
  // The weights have done their work: depths take their place.
  std::array<uint32_t, kMostSymbols>& depth = weight;
  depth[n - 2] = 0;
  for (size_t i = n - 2; i-- > 0;) depth[i] = depth[parent[n + i]] + 1;
  for (size_t i = 0; i < n; ++i) ++at_depth[std::min(depth[parent[i]] + 1, kDeepest)];
}

// No deeper than `most`: a leaf of a higher level goes down by one, and makes room beside it for
// one of those that are too deep.
void limit(std::array<uint32_t, kDeepest + 1>& at_depth, unsigned most) {
  for (unsigned d = most + 1; d <= kDeepest; ++d) {
    at_depth[most] += at_depth[d];
    at_depth[d] = 0;
  }
  uint64_t used = 0;
  for (unsigned d = 1; d <= most; ++d) used += uint64_t{at_depth[d]} << (most - d);
  for (; used > uint64_t{1} << most; --used) {
    unsigned d = most - 1;
    while (at_depth[d] == 0) --d;
    --at_depth[d];
    at_depth[d + 1] += 2;
    --at_depth[most];
  }
}

}  // namespace

void code_lengths(std::span<const uint32_t> counts, unsigned most, std::span<uint8_t> lengths) {
  std::fill(lengths.begin(), lengths.end(), uint8_t{0});
  Leaves leaves;
  const size_t n = sorted_leaves(counts, leaves);
  std::array<uint32_t, kDeepest + 1> at_depth{};
  depths(leaves, n, at_depth);
  limit(at_depth, most);
  size_t next = 0;
  for (unsigned d = most; d > 0; --d) {
    for (uint32_t i = 0; i < at_depth[d]; ++i) {
      lengths[symbol_of(leaves[next++])] = static_cast<uint8_t>(d);
    }
  }
}

void codes_of(std::span<const uint8_t> lengths, std::span<uint16_t> codes) {
  std::array<uint32_t, 17> next{};
  for (const uint8_t length : lengths) ++next[length + 1U];
  next[1] = 0;  // what has no code
  for (unsigned length = 2; length < next.size(); ++length) {
    next[length] = (next[length] + next[length - 1]) << 1;
  }
  for (size_t i = 0; i < lengths.size(); ++i) {
    const unsigned length = lengths[i];
    if (length == 0) continue;
    uint32_t code = next[length]++;
    uint32_t reversed = 0;
    for (unsigned bit = 0; bit < length; ++bit, code >>= 1) reversed = reversed << 1 | (code & 1);
    codes[i] = static_cast<uint16_t>(reversed);
  }
}

}  // namespace minivmm::block::qcow2::deflate
