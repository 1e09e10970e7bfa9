// SPDX-License-Identifier: Apache-2.0
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "block/jobs/zero_scan.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;

// One byte anywhere must be seen by every implementation: at each place of a vector register, in
// the part that fills none, and at each alignment of the buffer.
TEST(ZeroScan, EveryImplementationSeesASingleByteWhereverItIs) {
  Bytes memory(512);
  for (const ZeroTest is_zero : zero_tests()) {
    for (size_t begin = 0; begin < 33; ++begin) {
      for (const size_t length : {0UL, 1UL, 15UL, 63UL, 64UL, 127UL, 128UL, 300UL}) {
        EXPECT_TRUE(is_zero(memory.data() + begin, length));
        for (size_t at = 0; at < length; ++at) {
          memory[begin + at] = std::byte{0x80};
          EXPECT_FALSE(is_zero(memory.data() + begin, length)) << begin << " " << length;
          memory[begin + at] = std::byte{0};
        }
        // What lies outside does not count.
        memory[begin + length] = std::byte{1};
        EXPECT_TRUE(is_zero(memory.data() + begin, length));
        memory[begin + length] = std::byte{0};
      }
    }
  }
}

std::vector<ContentRun> runs_of(std::span<const std::byte> bytes, const ZeroGrain& grain) {
  std::vector<ContentRun> out;
  while (!bytes.empty()) {
    out.push_back(first_run(bytes, grain));
    EXPECT_GT(out.back().length, 0U);
    EXPECT_LE(out.back().length, bytes.size());
    bytes = bytes.subspan(out.back().length);
  }
  return out;
}

TEST(ZeroScan, RunsBeginAndEndAtBlocks) {
  Bytes bytes(8 * 4096);
  bytes[2 * 4096 + 5] = std::byte{1};
  bytes[3 * 4096] = std::byte{1};
  const auto runs = runs_of(bytes, ZeroGrain(4096));
  ASSERT_EQ(runs.size(), 3U);
  EXPECT_TRUE(runs[0].zero);
  EXPECT_EQ(runs[0].length, 2U * 4096);
  EXPECT_FALSE(runs[1].zero);
  EXPECT_EQ(runs[1].length, 2U * 4096);
  EXPECT_TRUE(runs[2].zero);
  EXPECT_EQ(runs[2].length, 4U * 4096);
}

TEST(ZeroScan, ShortRunsOfZeroesAreData) {
  Bytes bytes(16 * 512);
  bytes[0] = std::byte{1};
  bytes[4 * 512] = std::byte{1};  // 3 sectors of zeroes before it, 11 after it
  const auto runs = runs_of(bytes, ZeroGrain(4 * 512));
  ASSERT_EQ(runs.size(), 2U);
  EXPECT_FALSE(runs[0].zero);
  EXPECT_TRUE(runs[1].zero);
}

TEST(ZeroScan, AGrainOfNoneFindsNoZeroes) {
  const Bytes bytes(4096);
  const ContentRun run = first_run(bytes, ZeroGrain(0));
  EXPECT_FALSE(run.zero);
  EXPECT_EQ(run.length, bytes.size());
}

// A run that is called zero and is not would lose data.
TEST(ZeroScan, NoDataIsEverInARunOfZeroes) {
  const auto seed = std::random_device{}();
  std::mt19937 random(seed);
  for (int round = 0; round < 300; ++round) {
    Bytes bytes(1 + random() % 40'000);
    for (int i = 0; i < static_cast<int>(random() % 6); ++i) {
      bytes[random() % bytes.size()] = std::byte{1};
    }
    const ZeroGrain grain(512ULL * (1 + random() % 24));
    size_t at = 0;
    for (const ContentRun& run : runs_of(bytes, grain)) {
      if (run.zero) {
        EXPECT_TRUE(all_zero(std::span(bytes).subspan(at, run.length))) << "seed " << seed;
        const bool to_end = at + run.length == bytes.size();
        EXPECT_TRUE(run.length >= grain.least() || to_end) << "seed " << seed;
      }
      at += run.length;
    }
    EXPECT_EQ(at, bytes.size());
  }
}

}  // namespace
}  // namespace minivmm::block
