// SPDX-License-Identifier: Apache-2.0
// The answer to a READ in parts, of which one may be missing or have come twice.
#include <algorithm>
#include <initializer_list>
#include <random>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "block/protocols/nbd/read_coverage.h"

namespace minivmm::block {
namespace {

bool complete(std::initializer_list<std::pair<uint64_t, uint64_t>> parts) {
  ReadCoverage coverage(1000, 100);
  for (const auto& [offset, length] : parts) coverage.add(offset, length);
  return coverage.complete();
}

TEST(NbdReadCoverage, PartsInAnyOrderAreTheWhole) {
  EXPECT_TRUE(complete({{1000, 100}}));
  EXPECT_TRUE(complete({{1000, 1}, {1001, 99}}));
  EXPECT_TRUE(complete({{1050, 50}, {1000, 50}}));
  EXPECT_TRUE(complete({{1050, 25}, {1000, 50}, {1075, 25}, {1100, 0}}));
}

TEST(NbdReadCoverage, WhatIsMissingIsSeen) {
  EXPECT_FALSE(complete({}));
  EXPECT_FALSE(complete({{1000, 99}}));
  EXPECT_FALSE(complete({{1001, 99}}));
  EXPECT_FALSE(complete({{1000, 49}, {1050, 50}}));
  EXPECT_FALSE(complete({{1050, 50}}));
}

TEST(NbdReadCoverage, WhatCameTwiceDoesNotMakeUpForIt) {
  EXPECT_FALSE(complete({{1000, 50}, {1000, 50}}));
  EXPECT_FALSE(complete({{1050, 50}, {1050, 50}}));
  EXPECT_FALSE(complete({{1000, 100}, {1000, 100}}));
  EXPECT_FALSE(complete({{1000, 60}, {1050, 50}}));
  EXPECT_FALSE(complete({{1050, 30}, {1060, 40}, {1000, 50}}));
}

TEST(NbdReadCoverage, WhatLiesOutsideIsNeverRight) {
  EXPECT_FALSE(complete({{999, 101}}));
  EXPECT_FALSE(complete({{1000, 101}}));
  EXPECT_FALSE(complete({{1000, 100}, {1100, 1}}));
  EXPECT_FALSE(complete({{~uint64_t{0}, 100}, {1000, 100}}));
  EXPECT_FALSE(complete({{1001, ~uint64_t{0}}}));
}

TEST(NbdReadCoverage, RandomDivisionsAreTheWholeAndWithoutAnyPartTheyAreNot) {
  const auto seed = static_cast<unsigned>(testing::UnitTest::GetInstance()->random_seed());
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (int turn = 0; turn < 200; ++turn) {
    std::vector<std::pair<uint64_t, uint64_t>> parts;
    for (uint64_t at = 0; at < 4096;) {
      const uint64_t length = std::min<uint64_t>(1 + random() % 500, 4096 - at);
      parts.emplace_back(at, length);
      at += length;
    }
    std::shuffle(parts.begin(), parts.end(), random);
    ReadCoverage whole(0, 4096);
    for (const auto& [offset, length] : parts) whole.add(offset, length);
    EXPECT_TRUE(whole.complete());
    const size_t missing = random() % parts.size();
    ReadCoverage part(0, 4096);
    for (size_t i = 0; i < parts.size(); ++i) {
      if (i != missing) part.add(parts[i].first, parts[i].second);
    }
    EXPECT_FALSE(part.complete());
  }
}

TEST(NbdReadCoverage, TooManyPiecesOutOfOrderAreNotKept) {
  ReadCoverage coverage(0, 100'000);
  for (uint64_t at = 100'000; at-- > 0;) coverage.add(at, 1);
  EXPECT_FALSE(coverage.complete());
}

}  // namespace
}  // namespace minivmm::block
