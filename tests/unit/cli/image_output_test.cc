// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "base/error.h"
#include "cli/image_map_output.h"
#include "cli/image_measure_sizes.h"
#include "cli/image_personality.h"
#include "cli/image_progress.h"

namespace minivmm::cli {
namespace {

TEST(ImagePersonality, OnlyTheNameItselfCounts) {
  EXPECT_TRUE(is_called("qemu-img", "qemu-img"));
  EXPECT_TRUE(is_called("/usr/bin/qemu-img", "qemu-img"));
  EXPECT_FALSE(is_called("/opt/qemu-img/minivmm", "qemu-img"));
  EXPECT_FALSE(is_called("qemu-img.old", "qemu-img"));
  EXPECT_FALSE(is_called("", "qemu-img"));
}

TEST(ImageMeasure, SizesAreQemuImgs) {
  EXPECT_EQ(full_qcow2_size(10ULL << 30, {}), 10'739'318'784U);
  EXPECT_EQ(full_qcow2_size(1ULL << 40, {.cluster_size = 4096, .refcount_bits = 64}),
            1'103'823'433'728U);
  EXPECT_EQ(full_qcow2_size(1ULL << 40, {.extended_l2 = true}), 1'099'813'879'808U);
  EXPECT_EQ(full_qcow2_size(1 << 20, {}), 1'376'256U);
}

TEST(ImageProgress, PercentIsWhatScriptsParse) {
  EXPECT_EQ(percent_text({.done = 1, .total = 8}), "    (12.50/100%)");
  EXPECT_EQ(percent_text({.done = 0, .total = 0}), "    (100.00/100%)");
  // A total that was counted before the image grew is no reason for more than all.
  EXPECT_EQ(percent_text({.done = 9, .total = 8}), "    (100.00/100%)");
}

TEST(ImageProgress, TheBarTellsRateAndTimeLeft) {
  const std::string text = bar_text({.done = 1, .total = 4, .bytes = 300 << 20}, 10);
  EXPECT_NE(text.find("25.0%"), std::string::npos) << text;
  EXPECT_NE(text.find("30 MiB/s"), std::string::npos) << text;
  EXPECT_NE(text.find("0:30 left"), std::string::npos) << text;
}

TEST(ImageMap, RangesThatContinueEachOtherAreOne) {
  MapEntry entry{.start = 0, .length = 10, .data = true, .offset = 100, .file = "f"};
  EXPECT_TRUE(merge(entry, {.start = 10, .length = 5, .data = true, .offset = 110, .file = "f"}));
  EXPECT_EQ(entry.length, 15U);
  EXPECT_FALSE(merge(entry, {.start = 15, .length = 5, .data = true, .offset = 116, .file = "f"}));
  EXPECT_FALSE(merge(entry, {.start = 15, .length = 5, .data = true, .file = "f"}));
  EXPECT_FALSE(merge(entry, {.start = 15, .length = 5, .zero = true, .offset = 115, .file = "f"}));
}

TEST(ImageMap, ATableCannotSayWhereCompressedDataIs) {
  EXPECT_THROW(map_line({.length = 5, .data = true}), base::Error);
  EXPECT_EQ(map_line({.length = 5, .zero = true}), "");
}

TEST(ImageMap, NamesInAPictureAreNoMarkup) {
  const std::string svg =
      map_svg({{.start = 0, .length = 100, .data = true}}, {"<script>&\"\n"}, 100);
  EXPECT_EQ(svg.find("<script>"), std::string::npos);
  EXPECT_NE(svg.find("&lt;script&gt;&amp;&quot;\\x0a"), std::string::npos);
}

// A fragmented disk makes no larger a picture than its width.
TEST(ImageMap, APictureOfManyRangesStaysSmall) {
  std::vector<MapEntry> entries;
  for (uint64_t i = 0; i < 100'000; ++i) {
    entries.push_back({.start = i * 10,
                       .length = 10,
                       .depth = 0,
                       .present = true,
                       .zero = i % 2 == 0,
                       .data = i % 2 != 0});
  }
  EXPECT_LT(map_svg(entries, {"disk"}, 1'000'000).size(), 200'000U);
}

}  // namespace
}  // namespace minivmm::cli
