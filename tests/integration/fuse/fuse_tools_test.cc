// SPDX-License-Identifier: Apache-2.0
// The tools that people point at such files.
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include <gtest/gtest.h>

#include "fuse_fixture.h"

namespace minivmm::fuse {
namespace {

class FuseToolsTest : public FuseTest {
 protected:
  void need(const std::string& program) {
    if (!installed(program)) missing_ = program;
  }
  void make_ext4() {
    need("mke2fs");
    if (!missing_.empty()) return;
    image_ = dir_.path("image");
    ASSERT_EQ(run({"truncate", "-s", "32M", image_}), 0);
    ASSERT_EQ(run({"mke2fs", "-q", "-t", "ext4", image_}), 0);
    add("disk", "driver=file,filename=" + image_);
    start();
  }
  std::string missing_;
  std::string image_;
};

#define SKIP_IF_MISSING() \
  if (!missing_.empty()) GTEST_SKIP() << missing_ << " is not installed"

TEST_F(FuseToolsTest, E2fsckChecksAndRepairsThroughTheFile) {
  need("e2fsck");
  need("debugfs");
  make_ext4();
  SKIP_IF_MISSING();
  EXPECT_EQ(run({"e2fsck", "-fn", file("disk")}), 0);
  ASSERT_EQ(run({"debugfs", "-w", "-R", "clri <2>", file("disk")}), 0);  // the root directory
  EXPECT_NE(run({"e2fsck", "-fn", file("disk")}), 0);
  EXPECT_EQ(run({"e2fsck", "-fy", file("disk")}), 1) << "1: errors were corrected";
  EXPECT_EQ(run({"e2fsck", "-fn", file("disk")}), 0);
}

TEST_F(FuseToolsTest, AFileSystemInsideCanBeLoopMounted) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  need("e2fsck");
  make_ext4();
  SKIP_IF_MISSING();
  const std::string inner = dir_.path("inner");
  ASSERT_EQ(run({"mkdir", inner}), 0);
  if (::access("/dev/loop-control", R_OK) != 0 ||
      run({"mount", "-o", "loop", file("disk"), inner}) != 0) {
    GTEST_SKIP() << "no loop devices here";
  }
  const auto bytes = random_bytes(3'000'000, 1);
  {
    std::ofstream out(inner + "/file", std::ios::binary);
    out.write(reinterpret_cast<const char*>(bytes.data()),
              static_cast<std::streamsize>(bytes.size()));
    EXPECT_TRUE(out.flush());
  }
  EXPECT_EQ(run({"umount", inner}), 0);
  // Unmounting has written everything back through the file: the image alone holds it.
  ASSERT_EQ(run({"mount", "-o", "loop,ro", file("disk"), inner}), 0);
  std::vector<std::byte> in(bytes.size());
  std::ifstream file_in(inner + "/file", std::ios::binary);
  file_in.read(reinterpret_cast<char*>(in.data()), static_cast<std::streamsize>(in.size()));
  EXPECT_EQ(in, bytes);
  file_in.close();
  EXPECT_EQ(run({"umount", inner}), 0);
  EXPECT_EQ(run({"e2fsck", "-fn", file("disk")}), 0);
}

TEST_F(FuseToolsTest, DdAndCmpAgree) {
  add("disk", "driver=memory,size=4M");
  start();
  const std::string data = dir_.path("data");
  ASSERT_EQ(run({"dd", "if=/dev/urandom", "of=" + data, "bs=1M", "count=4"}), 0);
  // Without conv=notrunc: dd opens with O_TRUNC, as for any file.
  EXPECT_EQ(run({"dd", "if=" + data, "of=" + file("disk"), "bs=64K", "conv=fsync"}), 0);
  EXPECT_EQ(run({"cmp", data, file("disk")}), 0);
}

TEST_F(FuseToolsTest, QemuImgReadsAndWrites) {
  need("qemu-img");
  SKIP_IF_MISSING();
  add("disk", "driver=memory,size=4M");
  start();
  const std::string data = dir_.path("data");
  ASSERT_EQ(run({"dd", "if=/dev/urandom", "of=" + data, "bs=1M", "count=4"}), 0);
  EXPECT_EQ(run({"qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", data, file("disk")}), 0);
  EXPECT_EQ(run({"qemu-img", "compare", "-f", "raw", "-F", "raw", data, file("disk")}), 0);
}

}  // namespace
}  // namespace minivmm::fuse
