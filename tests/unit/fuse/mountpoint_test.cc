// SPDX-License-Identifier: Apache-2.0
#include "fuse/mountpoint.h"

#include <gtest/gtest.h>

namespace minivmm::fuse {
namespace {

constexpr const char* kInfo =
    "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
    "95 22 0:44 / /mnt/my\\040disks rw,nosuid,nodev,noatime - fuse.minivmm minivmm:17 rw\n"
    "96 22 0:45 / /mnt/a rw shared:3 master:4 - tmpfs none rw\n"
    "97 96 0:46 / /mnt/a rw - fuse.sshfs host:/x\\134y rw,user_id=0\n"
    "garbage\n"
    "98 22 0:47 / /mnt/b rw -\n"
    "\n";

TEST(MountsAt, FindsExactlyThePoint) {
  const auto mounts = mounts_at(kInfo, "/mnt/my disks");
  ASSERT_EQ(mounts.size(), 1U);
  EXPECT_EQ(mounts[0].type, kMountType);
  EXPECT_EQ(mounts[0].source, "minivmm:17");
  EXPECT_TRUE(mounts_at(kInfo, "/mnt").empty());
  EXPECT_TRUE(mounts_at(kInfo, "/mnt/my").empty());
  EXPECT_TRUE(mounts_at(kInfo, "/mnt/b").empty()) << "a line without a type";
  EXPECT_TRUE(mounts_at("", "/").empty());
}

// Mounts lie one over the other: who is on top decides, and optional fields come in any number.
TEST(MountsAt, KeepsTheOrderOfStackedMounts) {
  const auto mounts = mounts_at(kInfo, "/mnt/a");
  ASSERT_EQ(mounts.size(), 2U);
  EXPECT_EQ(mounts[0].type, "tmpfs");
  EXPECT_EQ(mounts[1].type, "fuse.sshfs");
  EXPECT_EQ(mounts[1].source, "host:/x\\y");
}

}  // namespace
}  // namespace minivmm::fuse
