// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/deflate/block_writer.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "block/formats/qcow2/deflate/huffman.h"

namespace minivmm::block::qcow2::deflate {
namespace {

constexpr unsigned kEnd = 256;  // the symbol that ends a block
constexpr unsigned kFirstLength = 257;
constexpr unsigned kLongestCode = 15;

struct LengthClass {
  uint16_t first;
  uint8_t extra_bits;
};
constexpr std::array<LengthClass, 29> kLengthClasses = {
    {{3, 0},  {4, 0},  {5, 0},  {6, 0},   {7, 0},   {8, 0},   {9, 0},   {10, 0},  {11, 1}, {13, 1},
     {15, 1}, {17, 1}, {19, 2}, {23, 2},  {27, 2},  {31, 2},  {35, 3},  {43, 3},  {51, 3}, {59, 3},
     {67, 4}, {83, 4}, {99, 4}, {115, 4}, {131, 5}, {163, 5}, {195, 5}, {227, 5}, {258, 0}}};

constexpr auto kClassOfLength = [] {
  std::array<uint8_t, kMaxMatch + 1> out{};
  for (uint8_t c = 0; c < kLengthClasses.size(); ++c) {
    for (size_t length = kLengthClasses[c].first; length <= kMaxMatch; ++length) out[length] = c;
  }
  return out;
}();

// Of a distance less 1: its class and how many bits say where in the class it is.
constexpr unsigned distance_bits(uint32_t from_0) {
  return from_0 < 4 ? 0 : static_cast<unsigned>(std::bit_width(from_0)) - 2;
}
constexpr unsigned distance_class(uint32_t from_0) {
  if (from_0 < 2) return from_0;
  const auto high = static_cast<unsigned>(std::bit_width(from_0)) - 1;
  return 2 * high + (from_0 >> (high - 1) & 1);
}
constexpr unsigned extra_bits_of_class(unsigned c) { return c < 4 ? 0 : c / 2 - 1; }

// Bits * 2^kFraction.
constexpr unsigned kFraction = 8;
uint32_t log2_of(uint32_t value) {
  constexpr unsigned kSteps = 8;
  static const auto table = [] {
    std::array<uint16_t, 1 << kSteps> out{};
    for (size_t i = 0; i < out.size(); ++i) {
      const double fraction = 1.0 + static_cast<double>(i) / static_cast<double>(out.size());
      out[i] = static_cast<uint16_t>(std::lround(std::log2(fraction) * (1 << kFraction)));
    }
    return out;
  }();
  const auto whole = static_cast<unsigned>(std::bit_width(value)) - 1;
  const uint32_t steps = whole >= kSteps ? value >> (whole - kSteps) : value << (kSteps - whole);
  return (whole << kFraction) + table[steps % table.size()];
}

// Of the symbols, coded as well as they can be, and of saying which codes.
uint64_t entropy(std::span<const uint32_t> counts) {
  constexpr uint64_t kBitsOfSymbol = 4;
  uint32_t total = 0;
  uint64_t symbols = 0;
  uint64_t sum = 0;
  for (const uint32_t count : counts) {
    if (count == 0) continue;
    total += count;
    ++symbols;
    sum += uint64_t{count} * log2_of(count);
  }
  if (total == 0) return 0;
  return uint64_t{total} * log2_of(total) - sum + (symbols * kBitsOfSymbol << kFraction);
}

void add(Counts& to, const Counts& from) {
  for (size_t i = 0; i < to.literals.size(); ++i) to.literals[i] += from.literals[i];
  for (size_t i = 0; i < to.distances.size(); ++i) to.distances[i] += from.distances[i];
}

uint64_t bits_of(const Counts& counts, std::span<const uint8_t> literals,
                 std::span<const uint8_t> distances) {
  uint64_t out = 0;
  for (size_t i = 0; i < literals.size(); ++i) {
    const unsigned extra = i >= kFirstLength && i - kFirstLength < kLengthClasses.size()
                               ? kLengthClasses[i - kFirstLength].extra_bits
                               : 0;
    out += uint64_t{counts.literals[i]} * (literals[i] + extra);
  }
  for (unsigned i = 0; i < distances.size(); ++i) {
    out += uint64_t{counts.distances[i]} * (distances[i] + extra_bits_of_class(i));
  }
  return out;
}

void fixed_lengths(std::span<uint8_t> literals, std::span<uint8_t> distances) {
  for (size_t i = 0; i < literals.size(); ++i) {
    literals[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
  }
  std::fill(distances.begin(), distances.end(), uint8_t{5});
}

size_t up_to_last(std::span<const uint8_t> lengths, size_t least) {
  size_t n = lengths.size();
  while (n > least && lengths[n - 1] == 0) --n;
  return n;
}

}  // namespace

// What says the codes of a block: their lengths, with runs, in codes of their own.
class LengthTable {
 public:
  LengthTable(std::span<const uint8_t> literals, std::span<const uint8_t> distances) {
    literals_ = up_to_last(literals.first(286), 257);
    distances_ = up_to_last(distances, 1);
    std::array<uint8_t, 286 + 30> all;
    std::copy_n(literals.begin(), literals_, all.begin());
    std::copy_n(distances.begin(), distances_, all.begin() + static_cast<long>(literals_));
    for (size_t at = 0, n = literals_ + distances_; at < n;) {
      size_t run = 1;
      while (at + run < n && all[at + run] == all[at]) ++run;
      add_run(all[at], run);
      at += run;
    }
    code_lengths(counts_, 7, lengths_);
    codes_of(lengths_, codes_);
    while (orders_ > 4 && lengths_[kOrder[orders_ - 1]] == 0) --orders_;
  }

  uint64_t bits() const {
    uint64_t out = 5 + 5 + 4 + 3 * orders_;
    for (unsigned i = 0; i < counts_.size(); ++i) {
      out += uint64_t{counts_[i]} * (lengths_[i] + extra_bits(i));
    }
    return out;
  }
  void write(BitWriter& to) const {
    to.put(literals_ - 257, 5);
    to.put(distances_ - 1, 5);
    to.put(orders_ - 4, 4);
    for (size_t i = 0; i < orders_; ++i) to.put(lengths_[kOrder[i]], 3);
    for (size_t i = 0; i < used_; ++i) {
      const Item item = items_[i];
      to.put(codes_[item.symbol], lengths_[item.symbol]);
      to.put(item.extra, extra_bits(item.symbol));
    }
  }

 private:
  static constexpr std::array<uint8_t, 19> kOrder = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                                     11, 4,  12, 3, 13, 2, 14, 1, 15};
  static constexpr unsigned kRepeat = 16;      // the last length, 3 to 6 times
  static constexpr unsigned kZeroes = 17;      // 3 to 10
  static constexpr unsigned kManyZeroes = 18;  // 11 to 138
  struct Item {
    uint8_t symbol;
    uint8_t extra;
  };

  static constexpr unsigned extra_bits(unsigned symbol) {
    return symbol == kRepeat ? 2 : symbol == kZeroes ? 3 : symbol == kManyZeroes ? 7 : 0;
  }
  void add_item(unsigned symbol, size_t extra) {
    items_[used_++] = {static_cast<uint8_t>(symbol), static_cast<uint8_t>(extra)};
    ++counts_[symbol];
  }
  void add_run(uint8_t length, size_t run) {
    if (length == 0) {
      for (; run >= 11; run -= std::min<size_t>(run, 138)) {
        add_item(kManyZeroes, std::min<size_t>(run, 138) - 11);
      }
      if (run >= 3) {
        add_item(kZeroes, run - 3);
        run = 0;
      }
    } else if (run > 3) {
      add_item(length, 0);
      for (--run; run >= 3; run -= std::min<size_t>(run, 6)) {
        add_item(kRepeat, std::min<size_t>(run, 6) - 3);
      }
    }
    for (; run > 0; --run) add_item(length, 0);
  }

  size_t literals_;
  size_t distances_;
  size_t orders_ = kOrder.size();
  std::array<Item, 286 + 30> items_;
  size_t used_ = 0;
  std::array<uint32_t, 19> counts_{};
  std::array<uint8_t, 19> lengths_{};
  std::array<uint16_t, 19> codes_{};
};

unsigned BlockWriter::length_symbol(uint32_t length) {
  return kFirstLength + kClassOfLength[length];
}
unsigned BlockWriter::distance_symbol(uint32_t distance) { return distance_class(distance - 1); }
uint64_t BlockWriter::cost(const Counts& counts) {
  return entropy(counts.literals) + entropy(counts.distances);
}

void BlockWriter::begin(std::span<const std::byte> data, std::span<std::byte> out) {
  data_ = data;
  writer_ = BitWriter(out);
  fits_ = true;
  used_ = chunk_begin_ = 0;
  chunk_end_ = kChunk;
  chunk_ = {};
  position_ = chunk_position_ = block_position_ = 0;
}

// Joins it with the block, or begins a block with it.
void BlockWriter::chunk_full() {
  const uint64_t alone = cost(chunk_);
  if (chunk_begin_ != 0) {
    Counts both = block_;
    add(both, chunk_);
    const uint64_t together = cost(both);
    constexpr uint64_t kBitsOfBlock = 64;
    if (used_ <= kMostTokens - kChunk &&
        together <= block_cost_ + alone + (kBitsOfBlock << kFraction)) {
      block_ = both;
      block_cost_ = together;
      chunk_begin_ = used_;
      chunk_position_ = position_;
    } else {
      write_block(block_, chunk_begin_, chunk_position_ - block_position_, false);
      block_position_ = chunk_position_;
      const size_t tokens = used_ - chunk_begin_;
      std::copy_n(tokens_.begin() + static_cast<long>(chunk_begin_), tokens, tokens_.begin());
      used_ = tokens;
      chunk_begin_ = 0;
    }
  }
  if (chunk_begin_ == 0) {
    block_ = chunk_;
    block_cost_ = alone;
    chunk_begin_ = used_;
    chunk_position_ = position_;
  }
  chunk_end_ = used_ + kChunk;
  chunk_ = {};
}

size_t BlockWriter::end() {
  if (used_ != chunk_begin_) chunk_full();
  write_block(chunk_begin_ == 0 ? chunk_ : block_, used_, position_ - block_position_, true);
  if (!fits_) return 0;
  writer_.align();
  return writer_.bits_used() / 8;
}

void BlockWriter::write_block(const Counts& counted, size_t tokens, size_t bytes, bool last) {
  if (!fits_) return;
  Counts& counts = codes_counts_;
  counts = counted;
  counts.literals[kEnd] = 1;
  std::array<uint8_t, 288> literals;
  std::array<uint8_t, 30> distances;
  code_lengths(std::span(counts.literals).first(286), kLongestCode, std::span(literals).first(286));
  literals[286] = literals[287] = 0;
  code_lengths(counts.distances, kLongestCode, distances);
  const LengthTable table(literals, distances);
  const uint64_t own = table.bits() + bits_of(counts, literals, distances);
  std::array<uint8_t, 288> fixed_literals;
  std::array<uint8_t, 30> fixed_distances;
  fixed_lengths(fixed_literals, fixed_distances);
  const uint64_t fixed = bits_of(counts, fixed_literals, fixed_distances);
  const uint64_t stored = stored_bits(bytes);
  constexpr unsigned kHead = 3;
  if (std::min({own + kHead, fixed + kHead, stored}) > writer_.bits_left()) {
    fits_ = false;
  } else if (stored < std::min(own, fixed) + kHead) {
    write_stored(data_.subspan(block_position_, bytes), last);
  } else if (fixed <= own) {
    writer_.put((last ? 1U : 0U) | 1U << 1, kHead);
    write_tokens(tokens, fixed_literals, fixed_distances);
  } else {
    writer_.put((last ? 1U : 0U) | 2U << 1, kHead);
    table.write(writer_);
    write_tokens(tokens, literals, distances);
  }
}

namespace {
constexpr size_t kMostStored = 65535;
}

uint64_t BlockWriter::stored_bits(size_t bytes) const {
  const uint64_t begin = writer_.bits_used();
  const size_t blocks = std::max<size_t>(1, (bytes + kMostStored - 1) / kMostStored);
  const uint64_t first = (begin + 3 + 7) / 8 * 8 - begin;
  return first + (blocks - 1) * 8 + blocks * 32 + 8 * bytes;
}

void BlockWriter::write_stored(std::span<const std::byte> from, bool last) {
  do {
    const auto now = from.first(std::min(from.size(), kMostStored));
    from = from.subspan(now.size());
    writer_.put(last && from.empty() ? 1 : 0, 3);
    writer_.align();
    writer_.put(now.size(), 16);
    writer_.put(~now.size() & 0xFFFF, 16);
    writer_.align();
    writer_.bytes(now);
  } while (!from.empty());
}

void BlockWriter::write_tokens(size_t tokens, std::span<const uint8_t> literal_lengths,
                               std::span<const uint8_t> distance_lengths) {
  std::array<uint16_t, 288> literals{};
  std::array<uint16_t, 30> distances{};
  codes_of(literal_lengths, literals);
  codes_of(distance_lengths, distances);
  for (size_t i = 0; i < tokens; ++i) {
    const uint32_t token = tokens_[i];
    const uint32_t length = token >> 16;
    if (length == 0) {
      writer_.put(literals[token], literal_lengths[token]);
      continue;
    }
    const LengthClass& c = kLengthClasses[kClassOfLength[length]];
    const unsigned symbol = length_symbol(length);
    const uint32_t from_0 = (token & 0xFFFF) - 1;
    const unsigned d = distance_class(from_0);
    const unsigned d_extra = distance_bits(from_0);
    uint64_t bits = literals[symbol];
    unsigned count = literal_lengths[symbol];
    bits |= uint64_t{length - c.first} << count;
    count += c.extra_bits;
    bits |= uint64_t{distances[d]} << count;
    count += distance_lengths[d];
    bits |= uint64_t{from_0 & ((1U << d_extra) - 1)} << count;
    writer_.put(bits, count + d_extra);
  }
  writer_.put(literals[kEnd], literal_lengths[kEnd]);
}

}  // namespace minivmm::block::qcow2::deflate
