// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "base/error.h"
#include "cli/image_named_file.h"

namespace minivmm::cli {
namespace {

TEST(NamedFile, OfAPath) {
  const NamedFile found = named_file({.text = "file:dir/disk", .format = "qcow2"});
  EXPECT_EQ(found.path, "dir/disk");
  EXPECT_EQ(found.format, "qcow2");
  EXPECT_EQ(found.file.peek("filename"), "dir/disk");
  EXPECT_TRUE(found.is_path);
}

TEST(NamedFile, OptionsAreTakenApart) {
  const NamedFile found =
      named_file({.text = "driver=qcow2,file.filename=a,encrypt.key-secret=s", .is_options = true});
  EXPECT_EQ(found.path, "a");
  EXPECT_EQ(found.format, "qcow2");
  EXPECT_EQ(found.file.peek("driver"), "file");
  EXPECT_TRUE(found.image.has("encrypt"));
  EXPECT_FALSE(found.image.has("file"));
  EXPECT_TRUE(found.is_path);
}

TEST(NamedFile, WhatIsMoreThanANameIsNoPath) {
  const ImageName locked{.text = "driver=qcow2,file.filename=a,file.locking=off",
                         .is_options = true};
  EXPECT_FALSE(named_file(locked).is_path);
  EXPECT_THROW(named_path(locked), base::Error);
  EXPECT_THROW(named_path({.text = "driver=qcow2,file.filename=a,backing=b", .is_options = true}),
               base::Error);
}

TEST(NamedFile, AProtocolAloneIsARawDisk) {
  const NamedFile found = named_file({.text = "driver=file,filename=a", .is_options = true});
  EXPECT_EQ(found.format, "raw");
  EXPECT_EQ(found.file.peek("driver"), "file");
  EXPECT_EQ(found.path, "a");
}

TEST(NamedFile, OptionsWithoutAFileAreRefused) {
  EXPECT_THROW(named_file({.text = "driver=qcow2", .is_options = true}), base::Error);
}

TEST(SnapshotOptions, OfANameOrANumberOrBoth) {
  EXPECT_EQ(snapshot_options("a=b"), (NodeOptions{{"snapshot", "a=b"}}));
  EXPECT_EQ(snapshot_options("snapshot.name=n,snapshot.id=1"),
            (NodeOptions{{"snapshot-id", "1"}, {"snapshot-name", "n"}}));
  EXPECT_THROW(snapshot_options("snapshot.frob=1"), base::Error);
  EXPECT_THROW(snapshot_options("snapshot.id=1,snapshot.frob=1"), base::Error);
}

}  // namespace
}  // namespace minivmm::cli
