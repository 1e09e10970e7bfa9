// SPDX-License-Identifier: Apache-2.0
// Holes: fallocate and lseek on the files of a mount, over a sparse file of the host.
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include <gtest/gtest.h>

#include "fuse_fixture.h"

namespace minivmm::fuse {
namespace {

constexpr off_t kMiB = 1 << 20;

class FuseSpaceTest : public FuseTest {
 protected:
  void SetUp() override {
    FuseTest::SetUp();
    if (IsSkipped()) return;
    image_ = dir_.path("image");
    ASSERT_EQ(run({"truncate", "-s", "4M", image_}), 0);
    add("disk", "driver=file,filename=" + image_);
    start();
    fd_ = open("disk", O_RDWR);
    ASSERT_TRUE(fd_);
  }
  int allocate(int mode, off_t offset, off_t length) const {
    return ::fallocate(fd_.get(), mode, offset, length) == 0 ? 0 : errno;
  }
  off_t seek(off_t offset, int whence) const {
    const off_t found = ::lseek(fd_.get(), offset, whence);
    return found < 0 ? -errno : found;
  }
  void fill(off_t offset, size_t size) const {
    const std::vector<std::byte> ones(size, std::byte{1});
    ASSERT_EQ(::pwrite(fd_.get(), ones.data(), size, offset), static_cast<ssize_t>(size));
  }
  // True if all of the range reads as `value`.
  bool holds(off_t offset, size_t size, int value) const {
    std::vector<std::byte> bytes(size);
    if (::pread(fd_.get(), bytes.data(), size, offset) != static_cast<ssize_t>(size)) return false;
    return bytes == std::vector<std::byte>(size, static_cast<std::byte>(value));
  }
  off_t image_blocks() const {
    struct stat info {};
    (void)::stat(image_.c_str(), &info);
    return info.st_blocks * 512;
  }

  std::string image_;
  base::UniqueFd fd_;
};

TEST_F(FuseSpaceTest, SeekFindsDataAndHoles) {
  fill(kMiB, 65536);
  EXPECT_EQ(seek(0, SEEK_DATA), kMiB);
  EXPECT_EQ(seek(0, SEEK_HOLE), 0);
  EXPECT_EQ(seek(kMiB + 5, SEEK_DATA), kMiB + 5);
  EXPECT_EQ(seek(kMiB, SEEK_HOLE), kMiB + 65536);
  EXPECT_EQ(seek(2 * kMiB, SEEK_DATA), -ENXIO) << "no data up to the end";
  EXPECT_EQ(seek(4 * kMiB, SEEK_HOLE), -ENXIO);
  EXPECT_EQ(seek(5 * kMiB, SEEK_DATA), -ENXIO);
  fill(4 * kMiB - 4096, 4096);
  EXPECT_EQ(seek(4 * kMiB - 4096, SEEK_HOLE), 4 * kMiB) << "every file ends in a hole";
}

TEST_F(FuseSpaceTest, PunchingMakesAHole) {
  fill(0, 2 * kMiB);
  const off_t before = image_blocks();
  EXPECT_EQ(allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 65536, kMiB), 0);
  EXPECT_TRUE(holds(0, 65536, 1));
  EXPECT_TRUE(holds(65536, kMiB, 0));
  EXPECT_TRUE(holds(kMiB + 65536, kMiB - 65536, 1));
  EXPECT_LE(image_blocks(), before - kMiB) << "the room was not given back";
  EXPECT_EQ(seek(0, SEEK_HOLE), 65536);
}

TEST_F(FuseSpaceTest, PunchingIsCutAtTheEnd) {
  fill(3 * kMiB, kMiB);
  EXPECT_EQ(allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 3 * kMiB, 100 * kMiB), 0);
  EXPECT_TRUE(holds(3 * kMiB, kMiB, 0));
  EXPECT_EQ(allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 10 * kMiB, kMiB), 0);
  struct stat info {};
  ASSERT_EQ(::fstat(fd_.get(), &info), 0);
  EXPECT_EQ(info.st_size, 4 * kMiB);
}

TEST_F(FuseSpaceTest, ZeroingAtOddPlacesTouchesNothingElse) {
  fill(0, 65536);
  EXPECT_EQ(allocate(FALLOC_FL_ZERO_RANGE, 1001, 9999), 0);
  EXPECT_TRUE(holds(0, 1001, 1));
  EXPECT_TRUE(holds(1001, 9999, 0));
  EXPECT_TRUE(holds(11000, 65536 - 11000, 1));
}

TEST_F(FuseSpaceTest, NothingGrowsTheFile) {
  EXPECT_EQ(allocate(0, 0, kMiB), 0);
  EXPECT_EQ(allocate(FALLOC_FL_KEEP_SIZE, 0, 4 * kMiB), 0);
  EXPECT_EQ(allocate(0, 4 * kMiB - 1, 2), ENOSPC);
  EXPECT_EQ(allocate(FALLOC_FL_KEEP_SIZE, 4 * kMiB, 1), ENOSPC);
  EXPECT_EQ(allocate(FALLOC_FL_ZERO_RANGE, 4 * kMiB - 1, 2), ENOSPC);
  fill(4 * kMiB - 4096, 4096);
  EXPECT_EQ(allocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 4 * kMiB - 4096, kMiB), 0);
  EXPECT_TRUE(holds(4 * kMiB - 4096, 4096, 0));
  EXPECT_EQ(allocate(FALLOC_FL_COLLAPSE_RANGE, 0, 4096), EOPNOTSUPP);
  struct stat info {};
  ASSERT_EQ(::fstat(fd_.get(), &info), 0);
  EXPECT_EQ(info.st_size, 4 * kMiB);
}

}  // namespace
}  // namespace minivmm::fuse
