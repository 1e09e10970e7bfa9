// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "base/error.h"
#include "cli/image_arguments.h"
#include "cli/image_graph.h"
#include "cli/image_info_output.h"

namespace minivmm::cli {
namespace {

TEST(SizeText, SwitchesUnitsWhereQemuImgDoes) {
  EXPECT_EQ(size_text(0), "0 B");
  EXPECT_EQ(size_text(999), "999 B");
  // The integer part never has four digits, although 1000 bytes are less than a KiB.
  EXPECT_EQ(size_text(1000), "0.977 KiB");
  EXPECT_EQ(size_text(1024), "1 KiB");
  EXPECT_EQ(size_text(1536), "1.5 KiB");
  EXPECT_EQ(size_text(uint64_t{1023} << 20), "0.999 GiB");
  EXPECT_EQ(size_text(uint64_t{1} << 63), "8 EiB");
  EXPECT_EQ(size_text(~uint64_t{0}), "16 EiB");
}

TEST(Printable, LeavesTextAloneAndShowsControlCharacters) {
  EXPECT_EQ(printable("disk ä.qcow2"), "disk ä.qcow2");
  EXPECT_EQ(printable("a\nb\x1b[2J\x7f"), "a\\x0ab\\x1b[2J\\x7f");
  EXPECT_EQ(printable(std::string("a\0b", 3)), "a\\x00b");
}

TEST(HostPath, DropsTheFileProtocolKeepsNbdAndRefusesOthers) {
  EXPECT_EQ(host_path("disk"), "disk");
  EXPECT_EQ(host_path("file:disk"), "disk");
  EXPECT_EQ(host_path("./a:b"), "./a:b");
  EXPECT_EQ(host_path("/dir/a:b"), "/dir/a:b");
  EXPECT_TRUE(host_path("nbd://host").starts_with("nbd://host"));
  EXPECT_EQ(host_path("nbd+unix:///a?socket=s"), "nbd+unix:///a?socket=s");
  EXPECT_THROW(host_path("http://host"), base::Error);
  EXPECT_THROW(host_path("json:{}"), base::Error);
  EXPECT_THROW(host_path(""), base::Error);
  EXPECT_THROW(host_path("file:"), base::Error);
}

TEST(PathFromImage, StartsFromTheImagesDirectory) {
  EXPECT_EQ(path_from_image("top", "base"), "base");
  EXPECT_EQ(path_from_image("dir/top", "base"), "dir/base");
  EXPECT_EQ(path_from_image("/dir/top", "../base"), "/dir/../base");
  EXPECT_EQ(path_from_image("dir/top", "/base"), "/base");
  EXPECT_EQ(path_from_image("dir/top", "nbd://host/x"), "nbd://host/x");
}

ImageFacts small_image() {
  ImageFacts facts;
  facts.path = "x";
  facts.format = "qcow2";
  facts.virtual_size = 1 << 20;
  facts.qcow2.emplace();
  return facts;
}

TEST(InfoJson, NamesThatAreNotUtf8DoNotBreakTheOutput) {
  ImageFacts facts = small_image();
  facts.qcow2->has_backing = true;
  facts.qcow2->backing_file = "\xff\xfe";
  // Dumping would throw; the file name is anybody's.
  EXPECT_NE(info_json(facts).find("\"backing-filename\": \""), std::string::npos);
}

TEST(InfoText, SnapshotNamesCannotPassForOtherLines) {
  ImageFacts facts = small_image();
  block::qcow2::SnapshotEntry snapshot;
  snapshot.id = "1";
  snapshot.name = "a\nencrypted: yes";
  facts.snapshots.push_back(snapshot);
  const std::string text = info_text(facts);
  EXPECT_EQ(text.find("\nencrypted"), std::string::npos);
  EXPECT_NE(text.find("a\\x0aencrypted: yes"), std::string::npos);
}

}  // namespace
}  // namespace minivmm::cli
