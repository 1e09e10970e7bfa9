// SPDX-License-Identifier: Apache-2.0
// The deflate encoder: zlib reads what it makes, with a window of 4 KiB, and it never writes more
// than it was given room for.
#include <string>

#include <algorithm>
#include <array>
#include <memory>
#include <random>

#include <fmt/core.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include "base/buffer.h"
#include "block/formats/qcow2/deflate/deflater.h"
#include "block/formats/qcow2/deflate/huffman.h"

namespace minivmm::block::qcow2::deflate {
namespace {

using Bytes = std::vector<std::byte>;

// With an output that is taken piece by piece: a distance of more than the window finds nothing.
Bytes inflate_in_pieces(std::span<const std::byte> packed) {
  z_stream stream{};
  if (inflateInit2(&stream, -12) != Z_OK) throw std::bad_alloc();
  // SAFETY: zlib only reads the input.
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(packed.data()));
  stream.avail_in = static_cast<uInt>(packed.size());
  Bytes out;
  std::array<std::byte, 1000> piece;
  int result = Z_OK;
  while (result == Z_OK) {
    stream.next_out = reinterpret_cast<Bytef*>(piece.data());
    stream.avail_out = piece.size();
    result = inflate(&stream, Z_NO_FLUSH);
    out.insert(out.end(), piece.begin(), piece.end() - static_cast<long>(stream.avail_out));
  }
  EXPECT_EQ(result, Z_STREAM_END) << (stream.msg != nullptr ? stream.msg : "");
  EXPECT_EQ(stream.avail_in, 0U) << "the end came early";
  inflateEnd(&stream);
  return out;
}

std::byte byte_of(uint64_t value) { return static_cast<std::byte>(value); }

Bytes noise(size_t size, unsigned values, std::mt19937_64& random) {
  Bytes out(size);
  for (std::byte& b : out) b = byte_of(random() % values);
  return out;
}

// Literals, and copies of what stands before, at distances on both sides of the window's end.
Bytes copies(size_t size, std::mt19937_64& random) {
  Bytes out = noise(std::min<size_t>(size, 64), 256, random);
  while (out.size() < size) {
    if (random() % 3 == 0) {
      out.push_back(byte_of(random()));
      continue;
    }
    const size_t far = 1 + random() % std::min<size_t>(out.size(), random() % 4 == 0 ? 6000 : 200);
    const size_t length =
        std::min(1 + random() % (random() % 8 == 0 ? 700 : 20), size - out.size());
    for (size_t i = 0; i < length; ++i) out.push_back(out[out.size() - far]);
  }
  return out;
}

Bytes periodic(size_t size, size_t period, std::mt19937_64& random) {
  Bytes out = noise(size, 256, random);
  for (size_t i = period; i < size; ++i) out[i] = out[i - period];
  return out;
}

Bytes content(unsigned kind, size_t size, std::mt19937_64& random) {
  switch (kind % 8) {
    case 0:
      return Bytes(size, byte_of(random()));
    case 1:
      return noise(size, 256, random);
    case 2:
      return noise(size, 2 + static_cast<unsigned>(random() % 20), random);
    case 3:
      return periodic(size, 1 + random() % 12, random);
    case 4:
      return periodic(size, 4090 + random() % 12, random);
    case 5: {  // blocks of different kinds
      Bytes out;
      while (out.size() < size) {
        const Bytes more = content(static_cast<unsigned>(random() % 4 + 1),
                                   std::min(size - out.size(), 1 + random() % 90000), random);
        out.insert(out.end(), more.begin(), more.end());
      }
      return out;
    }
    default:
      return copies(size, random);
  }
}

TEST(Deflate, ZlibReadsItWithAWindowOf4KiB) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  const auto deflater = std::make_unique<Deflater>();
  for (unsigned round = 0; round < 160; ++round) {
    const size_t size = round % 5 == 0 ? random() % 20 : random() % 100000;
    const Bytes plain = content(round, size, random);
    Bytes packed(size + size / 8 + 64);
    const size_t used = deflater->run(plain, packed);
    ASSERT_NE(used, 0U) << "round " << round;
    ASSERT_EQ(inflate_in_pieces(std::span(packed).first(used)), plain) << "round " << round;
  }
}

TEST(Deflate, TheLargestClusterIsNoExceptionNorIsNoise) {
  std::mt19937_64 random(4);
  const auto deflater = std::make_unique<Deflater>();
  for (unsigned kind : {1U, 5U, 6U}) {
    const Bytes plain = content(kind, 2 << 20, random);
    // Stored blocks add little to what does not compress.
    Bytes packed(plain.size() + 1024);
    const size_t used = deflater->run(plain, packed);
    ASSERT_NE(used, 0U);
    ASSERT_EQ(inflate_in_pieces(std::span(packed).first(used)), plain);
  }
}

TEST(Deflate, WithTooLittleRoomNothingIsWrittenBehindIt) {
  std::mt19937_64 random(5);
  const auto deflater = std::make_unique<Deflater>();
  for (unsigned kind = 0; kind < 8; ++kind) {
    const Bytes plain = content(kind, 30000, random);
    Bytes whole(40000);
    const size_t needed = deflater->run(plain, whole);
    ASSERT_NE(needed, 0U);
    for (const size_t room : {size_t{0}, size_t{1}, needed / 3, needed - 9, needed - 1, needed}) {
      constexpr std::byte kGuard{0xA5};
      Bytes out(room + 16, kGuard);
      const size_t used = deflater->run(plain, std::span(out).first(room));
      EXPECT_EQ(used, room == needed ? needed : 0) << "kind " << kind << ", room " << room;
      EXPECT_TRUE(std::all_of(out.begin() + static_cast<long>(room), out.end(),
                              [](std::byte b) { return b == kGuard; }))
          << "kind " << kind << ", room " << room;
      if (used == needed) {
        EXPECT_TRUE(std::equal(out.begin(), out.begin() + static_cast<long>(used), whole.begin()))
            << "the result depends on more than the data";
      }
    }
  }
}

// What zlib makes at the level that QEMU takes, of the program that runs here.
TEST(Deflate, MachineCodeIsNoLargerThanZlibMakesIt) {
  Bytes code(512 << 10);
  FILE* const self = std::fopen("/proc/self/exe", "rb");
  ASSERT_NE(self, nullptr);
  ASSERT_EQ(std::fseek(self, 64 << 10, SEEK_SET), 0);
  ASSERT_EQ(std::fread(code.data(), 1, code.size(), self), code.size());
  std::fclose(self);
  const auto deflater = std::make_unique<Deflater>();
  size_t ours = 0;
  size_t theirs = 0;
  constexpr size_t kCluster = 64 << 10;
  Bytes out(2 * kCluster);
  for (size_t at = 0; at < code.size(); at += kCluster) {
    const auto cluster = std::span(code).subspan(at, kCluster);
    ours += deflater->run(cluster, out);
    z_stream stream{};
    ASSERT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY), Z_OK);
    // SAFETY: zlib only reads the input.
    stream.next_in = reinterpret_cast<Bytef*>(cluster.data());
    stream.avail_in = kCluster;
    stream.next_out = reinterpret_cast<Bytef*>(out.data());
    stream.avail_out = static_cast<uInt>(out.size());
    ASSERT_EQ(::deflate(&stream, Z_FINISH), Z_STREAM_END);
    theirs += stream.total_out;
    deflateEnd(&stream);
  }
  EXPECT_LT(static_cast<double>(ours), 1.01 * static_cast<double>(theirs));
}

TEST(DeflateCodes, AreCompleteAndWithinTheirLimit) {
  std::vector<uint32_t> fibonacci = {1, 1};
  while (fibonacci.size() < 20) fibonacci.push_back(*fibonacci.rbegin() + fibonacci.rbegin()[1]);
  const std::vector<std::vector<uint32_t>> cases = {
      fibonacci, {0, 0, 0}, {0, 9, 0}, {5, 5}, std::vector<uint32_t>(19, 3), {1, 0, 1000, 1, 7}};
  for (const auto& counts : cases) {
    for (const unsigned most : {7U, 15U}) {
      std::vector<uint8_t> lengths(counts.size());
      code_lengths(counts, most, lengths);
      uint32_t used = 0;
      for (size_t i = 0; i < lengths.size(); ++i) {
        ASSERT_LE(lengths[i], most);
        ASSERT_TRUE(counts[i] == 0 || lengths[i] != 0) << i;
        if (lengths[i] != 0) used += 1U << (most - lengths[i]);
        for (size_t j = 0; j < i; ++j) {
          ASSERT_TRUE(counts[j] == 0 || counts[i] <= counts[j] || lengths[i] <= lengths[j]);
        }
      }
      EXPECT_EQ(used, 1U << most) << "not every reader takes an incomplete code";
    }
  }
}

TEST(DeflateCodes, AreTheOnesOfTheStandardsExample) {
  // RFC 1951, 3.2.2: A to H with 3, 3, 3, 3, 3, 2, 4 and 4 bits.
  const std::array<uint8_t, 8> lengths = {3, 3, 3, 3, 3, 2, 4, 4};
  std::array<uint16_t, 8> codes{};
  codes_of(lengths, codes);
  const std::array<uint16_t, 8> first_bit_lowest = {0b010, 0b110, 0b001,  0b101,
                                                    0b011, 0b00,  0b0111, 0b1111};
  EXPECT_EQ(codes, first_bit_lowest);
}

}  // namespace
}  // namespace minivmm::block::qcow2::deflate
