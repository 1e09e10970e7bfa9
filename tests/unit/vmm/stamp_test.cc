// SPDX-License-Identifier: Apache-2.0
// The block format and the plan that the probe guest shares with its checkers.
#include "images/probe/stamp.h"

#include <array>
#include <set>

#include <gtest/gtest.h>

#include "images/probe/stress_plan.h"

namespace minivmm::probe {
namespace {

using Sector = std::array<uint64_t, kStampWords>;

TEST(Stamp, ReadsWhatWasFilled) {
  Sector sector{};
  const Stamp stamp{.offset = 0x1234000, .sequence = 77, .writer = 3, .seed = 9};
  fill_stamp(sector.data(), stamp);
  Stamp found;
  EXPECT_EQ(read_stamp(sector.data(), 0x1234000, &found), SectorKind::kStamp);
  EXPECT_EQ(found, stamp);
}

TEST(Stamp, EverySingleBitFlipIsNoticed) {
  Sector sector{};
  fill_stamp(sector.data(), {.offset = 512, .sequence = 1, .writer = 1, .seed = 1});
  for (unsigned bit = 0; bit < kSectorBytes * 8; ++bit) {
    Sector flipped = sector;
    flipped[bit / 64] ^= uint64_t{1} << (bit % 64);
    Stamp found;
    ASSERT_NE(read_stamp(flipped.data(), 512, &found), SectorKind::kStamp) << bit;
  }
}

// Half of one write and half of another: what a torn sector looks like.
TEST(Stamp, MixedSectorsAreDamaged) {
  Sector older{};
  Sector newer{};
  fill_stamp(older.data(), {.offset = 512, .sequence = 1, .writer = 1, .seed = 1});
  fill_stamp(newer.data(), {.offset = 512, .sequence = 2, .writer = 1, .seed = 1});
  for (unsigned cut = 3; cut < kStampWords; ++cut) {
    Sector mixed = newer;
    std::copy(older.begin() + cut, older.end(), mixed.begin() + cut);
    Stamp found;
    ASSERT_EQ(read_stamp(mixed.data(), 512, &found), SectorKind::kDamaged) << cut;
  }
}

TEST(Stamp, ASectorInTheWrongPlaceIsDamaged) {
  Sector sector{};
  fill_stamp(sector.data(), {.offset = 512, .sequence = 1, .writer = 1, .seed = 1});
  Stamp found;
  EXPECT_EQ(read_stamp(sector.data(), 1024, &found), SectorKind::kDamaged);
}

TEST(Stamp, TellsZeroesFromForeignData) {
  Sector sector{};
  Stamp found;
  EXPECT_EQ(read_stamp(sector.data(), 0, &found), SectorKind::kZero);
  sector[63] = 1;
  EXPECT_EQ(read_stamp(sector.data(), 0, &found), SectorKind::kForeign);
}

TEST(StressPlan, StaysInsideItsRangeAndUsesAllOfIt) {
  for (const uint64_t blocks : {uint64_t{1}, uint64_t{2}, uint64_t{7}, uint64_t{100}}) {
    const StressParameters parameters{
        .seed = 5, .blocks = blocks, .zeroes = true, .discards = true};
    std::set<uint64_t> seen;
    std::set<StressOp> ops;
    for (uint64_t i = 1; i < 20000; ++i) {
      const StressRequest request = stress_request(parameters, i);
      ASSERT_GE(request.count, 1u);
      ASSERT_LE(request.count, parameters.max_blocks);
      ASSERT_LE(request.block + request.count, blocks);
      for (uint32_t b = 0; b < request.count; ++b) seen.insert(request.block + b);
      ops.insert(request.op);
    }
    EXPECT_EQ(seen.size(), blocks);
    EXPECT_EQ(ops.size(), 5u);
  }
}

TEST(StressPlan, AsksOnlyForWhatIsAllowed) {
  const StressParameters parameters{.seed = 5, .blocks = 100};
  for (uint64_t i = 1; i < 20000; ++i) {
    const StressOp op = stress_request(parameters, i).op;
    ASSERT_TRUE(op == StressOp::kWrite || op == StressOp::kRead || op == StressOp::kFlush);
  }
}

}  // namespace
}  // namespace minivmm::probe
