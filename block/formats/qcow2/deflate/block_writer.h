// SPDX-License-Identifier: Apache-2.0
// Deflate's blocks: what was found, literals and matches, to codes that fit it.
//
// The tokens come in chunks. A chunk goes into the block before it unless it is so different that
// codes of its own are worth their table.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "block/formats/qcow2/deflate/bit_writer.h"
#include "block/formats/qcow2/deflate/match_finder.h"

namespace minivmm::block::qcow2::deflate {

// How often each symbol occurs.
struct Counts {
  std::array<uint32_t, 288> literals{};  // and lengths
  std::array<uint32_t, 30> distances{};
};

class BlockWriter {
 public:
  // Tokens a chunk, and at most a block.
  static constexpr size_t kChunk = 2048;
  static constexpr size_t kMostTokens = 10 * kChunk;

  // `data` is what is compressed: a block may store it as it is.
  void begin(std::span<const std::byte> data, std::span<std::byte> out);

  void literal(std::byte value) {
    tokens_[used_++] = static_cast<uint32_t>(value);
    ++chunk_.literals[static_cast<size_t>(value)];
    ++position_;
    if (used_ == chunk_end_) chunk_full();
  }
  void match(const Match& match) {
    tokens_[used_++] = match.length << 16 | match.distance;
    ++chunk_.literals[length_symbol(match.length)];
    ++chunk_.distances[distance_symbol(match.distance)];
    position_ += match.length;
    if (used_ == chunk_end_) chunk_full();
  }

  // False: it does not fit, and what follows is for nothing.
  bool fits() const { return fits_; }
  // Returns the bytes that were filled; 0: they do not fit.
  size_t end();

 private:
  static unsigned length_symbol(uint32_t length);
  static unsigned distance_symbol(uint32_t distance);
  static uint64_t cost(const Counts& counts);

  void chunk_full();
  void write_block(const Counts& counts, size_t tokens, size_t bytes, bool last);
  void write_stored(std::span<const std::byte> from, bool last);
  uint64_t stored_bits(size_t bytes) const;
  // With codes of these lengths, and the symbol that ends the block.
  void write_tokens(size_t tokens, std::span<const uint8_t> literals,
                    std::span<const uint8_t> distances);

  std::span<const std::byte> data_;
  BitWriter writer_{{}};
  bool fits_ = true;
  std::array<uint32_t, kMostTokens> tokens_;  // a literal, or length << 16 | distance
  size_t used_ = 0;
  size_t chunk_begin_ = 0;  // in tokens_; what is before is the block
  size_t chunk_end_ = kChunk;
  Counts block_;
  Counts chunk_;
  Counts codes_counts_;  // write_block's
  uint64_t block_cost_ = 0;
  size_t position_ = 0;        // in data_
  size_t chunk_position_ = 0;  // where the chunk begins
  size_t block_position_ = 0;
};

}  // namespace minivmm::block::qcow2::deflate
