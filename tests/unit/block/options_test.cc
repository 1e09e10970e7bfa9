// SPDX-License-Identifier: Apache-2.0
#include "block/graph/options.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

TEST(Options, KeysAndJsonGiveTheSameTree) {
  const auto keys = Options::from_keys("driver=qcow2,file.driver=file,file.filename=a,,b,ro");
  const auto json = Options::from_json(
      R"({"driver": "qcow2", "file": {"driver": "file", "filename": "a,b"}, "ro": true})");
  EXPECT_EQ(keys.to_json(), json.to_json());
}

TEST(Options, TakenOnceAndLeftoversAreNamed) {
  auto options = Options::from_keys("a=1,cache.direct=on,cache.x=2");
  EXPECT_EQ(options.take_uint("a", 0, 0, 10), 1U);
  EXPECT_FALSE(options.take_string("a"));
  EXPECT_TRUE(options.take_bool("cache.direct", false));
  EXPECT_EQ(error_text([&] { options.finish("'disk0' (file)"); }),
            "'disk0' (file): unknown option 'cache'");
  EXPECT_EQ(options.take_string("cache.x"), "2");
  options.finish("nothing is left");
}

TEST(Options, ConflictsAndBadValuesSayWhatIsExpected) {
  EXPECT_NE(error_text([] { Options::from_keys("a=1,a=2"); }).find("given twice"),
            std::string::npos);
  EXPECT_NE(error_text([] { Options::from_keys("a=1,a.b=2"); }).find("has a value already"),
            std::string::npos);
  EXPECT_THROW(Options::from_keys("=1"), base::Error);
  EXPECT_THROW(Options::from_json("[1]"), base::Error);
  EXPECT_THROW(Options::from_json("{\"a\": "), base::Error);
  auto options = Options::from_keys("n=99,b=maybe,c=blue");
  EXPECT_NE(error_text([&] { options.take_uint("n", 0, 1, 64); }).find("from 1 to 64"),
            std::string::npos);
  EXPECT_THROW(options.take_bool("b", false), base::Error);
  EXPECT_NE(error_text([&] {
              options.take_choice("c", {"red", "green"}, 0);
            }).find("red, green"),
            std::string::npos);
}

TEST(Options, HostileJsonNestingIsRefusedNotRecursedInto) {
  std::string deep;
  for (int i = 0; i < 100000; ++i) deep += "{\"a\":";
  EXPECT_THROW(Options::from_json(deep), base::Error);
}

// File names may be any bytes.
TEST(Options, WhatIsNotUtf8IsShownReplaced) {
  Options options;
  options.set("name\xff", "value\xfe");
  EXPECT_NE(options.to_json().find("value"), std::string::npos);
}

TEST(Options, ChildrenAreInlineReferencesOrNull) {
  auto options = Options::from_json(R"({"file": {"driver": "memory"}, "backing": "base0"})");
  auto file = options.take_child("file");
  ASSERT_TRUE(file && file->options);
  EXPECT_EQ(file->options->take_string("driver"), "memory");
  auto backing = options.take_child("backing");
  ASSERT_TRUE(backing);
  EXPECT_EQ(backing->reference, "base0");
  EXPECT_TRUE(Options::from_json(R"({"backing": null})").take_null("backing"));
  EXPECT_TRUE(Options::from_keys("backing=").take_null("backing"));
}

TEST(Sizes, ReadLikeQemuImg) {
  EXPECT_EQ(parse_size("65536", "s"), 65536U);
  EXPECT_EQ(parse_size("64K", "s"), 65536U);
  EXPECT_EQ(parse_size("1.5G", "s"), 1610612736U);
  EXPECT_EQ(parse_size("0x1000", "s"), 4096U);
  EXPECT_EQ(parse_size("2t", "s"), uint64_t{2} << 40);
  for (const char* bad : {"", "-1", "64Q", "K", "1.5", "99999999999E", "64KB", "0xzz"}) {
    EXPECT_THROW(parse_size(bad, "s"), base::Error) << bad;
  }
}

}  // namespace
}  // namespace minivmm::block
