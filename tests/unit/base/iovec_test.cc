// SPDX-License-Identifier: Apache-2.0
#include "base/iovec.h"

#include <string>

#include <vector>

#include <gtest/gtest.h>

#include "base/checked.h"

namespace minivmm::base {
namespace {

TEST(IoList, SlicesAcrossBuffersWithoutCopying) {
  char a[] = "abc";
  char b[] = "defg";
  const iovec iov[] = {{a, 3}, {nullptr, 0}, {b, 4}};
  const IoSpan span{std::span(iov)};
  EXPECT_EQ(span.bytes(), 7U);
  for (uint64_t skip = 0; skip <= 7; ++skip) {
    for (uint64_t length = 0; length <= 7 - skip; ++length) {
      IoList storage;
      const IoSpan piece = slice(span, skip, length, storage);
      EXPECT_EQ(piece.bytes(), length);
      std::string text(length, '?');
      EXPECT_EQ(copy_from(piece, 0, std::as_writable_bytes(std::span(text))), length);
      EXPECT_EQ(text, std::string("abcdefg").substr(skip, length));
    }
  }
}

TEST(IoList, GrowsBeyondItsInlineEntries) {
  std::vector<char> bytes(1000);
  IoList list;
  for (char& c : bytes) list.add(&c, 1);
  EXPECT_EQ(list.count(), 1000U);
  EXPECT_EQ(list.bytes(), 1000U);
  const std::string pattern(1000, 'z');
  EXPECT_EQ(copy_to(list, 0, std::as_bytes(std::span(pattern))), 1000U);
  fill_zero(list, 10, 5);
  EXPECT_EQ(bytes[9], 'z');
  EXPECT_EQ(bytes[10], 0);
  EXPECT_EQ(bytes[14], 0);
  EXPECT_EQ(bytes[15], 'z');
}

TEST(IsZero, FindsASingleByteAnywhere) {
  std::vector<std::byte> bytes(200);
  EXPECT_TRUE(is_zero(bytes));
  EXPECT_TRUE(is_zero({}));
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = std::byte{1};
    EXPECT_FALSE(is_zero(bytes)) << i;
    bytes[i] = std::byte{0};
  }
}

TEST(Checked, RangesNeverWrap) {
  EXPECT_TRUE(range_fits(0, 0, 0));
  EXPECT_TRUE(range_fits(5, 5, 10));
  EXPECT_FALSE(range_fits(5, 6, 10));
  EXPECT_FALSE(range_fits(~uint64_t{0}, 2, 10));
  EXPECT_FALSE(range_fits(2, ~uint64_t{0}, 10));
  EXPECT_FALSE(checked_add<uint64_t>(~uint64_t{0}, 1));
  EXPECT_FALSE(checked_mul<uint32_t>(1U << 20, 1U << 12));
  EXPECT_EQ(div_ceil<uint64_t>(~uint64_t{0}, 2), uint64_t{1} << 63);
}

}  // namespace
}  // namespace minivmm::base
