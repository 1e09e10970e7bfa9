// SPDX-License-Identifier: Apache-2.0
// What a file of the mount is to those who use it.
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <set>
#include <thread>

#include <dirent.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "fuse_fixture.h"

namespace minivmm::fuse {
namespace {

using testing::ElementsAre;
constexpr std::chrono::seconds kLimit{10};

class FuseFileTest : public FuseTest {
 protected:
  // pwrite's result, or -errno.
  static ssize_t write_at(int fd, std::span<const std::byte> bytes, off_t offset) {
    const ssize_t n = ::pwrite(fd, bytes.data(), bytes.size(), offset);
    return n < 0 ? -errno : n;
  }
  static std::vector<std::byte> read_at(int fd, size_t size, off_t offset) {
    std::vector<std::byte> out(size);
    const ssize_t n = ::pread(fd, out.data(), size, offset);
    EXPECT_GE(n, 0) << std::strerror(errno);
    out.resize(n < 0 ? 0 : static_cast<size_t>(n));
    return out;
  }
};

TEST_F(FuseFileTest, WhatIsWrittenIsReadBack) {
  add("disk", "driver=memory,size=4M");
  start();
  const auto fd = open("disk", O_RDWR);
  ASSERT_TRUE(fd);
  // Odd places and lengths: one byte, across pages, more than the largest single request.
  const struct {
    off_t offset;
    size_t size;
  } pieces[] = {{0, 1}, {4095, 2}, {511, 4097}, {1000003, (size_t{2} << 20) + 17}};
  for (const auto& piece : pieces) {
    const auto bytes = random_bytes(piece.size, piece.size);
    ASSERT_EQ(write_at(fd.get(), bytes, piece.offset), static_cast<ssize_t>(bytes.size()));
    EXPECT_EQ(read_at(fd.get(), piece.size, piece.offset), bytes) << piece.offset;
  }
}

TEST_F(FuseFileTest, DirectIoWorksAlignedAndNot) {
  add("disk", "driver=memory,size=4M");
  start();
  const auto fd = open("disk", O_RDWR | O_DIRECT);
  ASSERT_TRUE(fd) << std::strerror(errno);
  AlignedBytes out(8192, 0x5a);
  AlignedBytes in(8192);
  ASSERT_EQ(write_at(fd.get(), out.span(), 4096), 8192);
  ASSERT_EQ(::pread(fd.get(), in.data(), 8192, 4096), 8192);
  EXPECT_EQ(std::memcmp(in.data(), out.data(), 8192), 0);
  ASSERT_EQ(write_at(fd.get(), out.span().subspan(1, 777), 123), 777);
  EXPECT_EQ(read_at(fd.get(), 777, 123), std::vector<std::byte>(777, std::byte{0x5a}));
}

TEST_F(FuseFileTest, EndsAtTheEndOfTheDisk) {
  add("disk", "driver=memory,size=1000001");  // no multiple of anything
  start();
  const auto fd = open("disk", O_RDWR);
  struct stat info {};
  ASSERT_EQ(::fstat(fd.get(), &info), 0);
  EXPECT_EQ(info.st_size, 1000001);
  EXPECT_EQ(read_at(fd.get(), 100, 1000000).size(), 1U);
  EXPECT_EQ(read_at(fd.get(), 100, 1000001).size(), 0U);
  EXPECT_EQ(read_at(fd.get(), 100, off_t{1} << 40).size(), 0U);
  const std::vector<std::byte> bytes(100, std::byte{7});
  EXPECT_EQ(write_at(fd.get(), bytes, 1000000), 1) << "what fits is written, as on a block device";
  EXPECT_EQ(write_at(fd.get(), bytes, 1000001), -ENOSPC);
  EXPECT_EQ(write_at(fd.get(), bytes, off_t{1} << 40), -ENOSPC);
  const auto append = open("disk", O_WRONLY | O_APPEND);
  EXPECT_EQ(::write(append.get(), bytes.data(), bytes.size()), -1);
  EXPECT_EQ(errno, ENOSPC);
  ASSERT_EQ(::fstat(fd.get(), &info), 0);
  EXPECT_EQ(info.st_size, 1000001);
}

TEST_F(FuseFileTest, ShowsOneFileAnExport) {
  add("disk0", "driver=memory,size=4M");
  add("disk 1", "driver=memory,size=8M,read-only=on", false);
  start();
  std::set<std::string> names;
  DIR* const directory = ::opendir(dir_.path("mnt").c_str());
  ASSERT_NE(directory, nullptr);
  while (const dirent* entry = ::readdir(directory)) names.insert(entry->d_name);
  ::closedir(directory);
  EXPECT_THAT(names, ElementsAre(".", "..", "disk 1", "disk0"));
  struct stat info {};
  ASSERT_EQ(::stat(file("disk0").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode, mode_t{S_IFREG | 0600});
  EXPECT_EQ(info.st_size, 4 << 20);
  EXPECT_EQ(info.st_uid, ::geteuid());
  ASSERT_EQ(::stat(file("disk 1").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode, mode_t{S_IFREG | 0400});
  EXPECT_EQ(info.st_size, 8 << 20);
  struct statvfs space {};
  ASSERT_EQ(::statvfs(dir_.path("mnt").c_str(), &space), 0);
  EXPECT_EQ(space.f_blocks * space.f_frsize, 12U << 20);
  EXPECT_EQ(space.f_bavail, 0U);
}

TEST_F(FuseFileTest, ManyFilesAreAllListed) {
  // More than one READDIR reply holds.
  std::set<std::string> expected{".", ".."};
  for (int i = 0; i < 200; ++i) {
    const std::string name = "a-rather-long-name-of-a-disk-" + std::to_string(i);
    add(name, "driver=null,size=1M");
    expected.insert(name);
  }
  start();
  std::set<std::string> names;
  DIR* const directory = ::opendir(dir_.path("mnt").c_str());
  ASSERT_NE(directory, nullptr);
  size_t entries = 0;
  for (; const dirent* entry = ::readdir(directory); ++entries) names.insert(entry->d_name);
  ::closedir(directory);
  EXPECT_EQ(names, expected);
  EXPECT_EQ(entries, expected.size()) << "an entry came twice";
}

TEST_F(FuseFileTest, OptionsGiveOwnerAndMode) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  mount_ = std::make_unique<Mount>(
      loops_, dir_.path("mnt"),
      MountOptions{.mode = 0664, .uid = 1234, .gid = 4321, .allow_other = true});
  add("disk", "driver=memory,size=4M");
  add("ro", "driver=memory,size=4M,read-only=on", false);
  start();
  struct stat info {};
  ASSERT_EQ(::stat(file("disk").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode, mode_t{S_IFREG | 0664});
  EXPECT_EQ(info.st_uid, 1234U);
  EXPECT_EQ(info.st_gid, 4321U);
  ASSERT_EQ(::stat(file("ro").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode, mode_t{S_IFREG | 0444});
  ASSERT_EQ(::stat(dir_.path("mnt").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode, mode_t{S_IFDIR | 0555});
}

TEST_F(FuseFileTest, ReadOnlyFilesRefuseWriting) {
  add("disk", "driver=memory,size=4M", false);
  start();
  EXPECT_FALSE(open("disk", O_RDWR));
  EXPECT_EQ(errno, ::geteuid() == 0 ? EROFS : EACCES);
  EXPECT_FALSE(open("disk", O_WRONLY | O_TRUNC));
  EXPECT_EQ(::truncate(file("disk").c_str(), 5), -1);
  EXPECT_EQ(errno, ::geteuid() == 0 ? EROFS : EACCES);
  const auto fd = open("disk", O_RDONLY);
  EXPECT_TRUE(fd);
  EXPECT_EQ(read_at(fd.get(), 512, 0).size(), 512U);
}

TEST_F(FuseFileTest, SizeIsFixedAndTruncatingOpensAreHarmless) {
  add("disk", "driver=memory,size=4M");
  start();
  const auto bytes = random_bytes(4096, 5);
  {
    const auto fd = open("disk", O_RDWR);
    ASSERT_EQ(write_at(fd.get(), bytes, 0), 4096);
    EXPECT_EQ(::ftruncate(fd.get(), 4 << 20), 0) << "the same size: tools do that";
    EXPECT_EQ(::ftruncate(fd.get(), 8 << 20), -1);
    EXPECT_EQ(errno, EPERM);
    EXPECT_EQ(::ftruncate(fd.get(), 0), -1);
    EXPECT_EQ(errno, EPERM);
  }
  const auto other = open("disk", O_RDONLY | O_DIRECT);
  const auto truncating = open("disk", O_RDWR | O_TRUNC);
  ASSERT_TRUE(truncating) << std::strerror(errno);
  struct stat info {};
  ASSERT_EQ(::fstat(truncating.get(), &info), 0);
  EXPECT_EQ(info.st_size, 4 << 20);
  EXPECT_EQ(read_at(truncating.get(), 4096, 0), bytes);
  // A kernel that believed the file empty would give the others an end of file.
  AlignedBytes in(4096);
  EXPECT_EQ(::pread(other.get(), in.data(), 4096, 0), 4096);
}

TEST_F(FuseFileTest, DirectoryCannotBeChanged) {
  add("disk", "driver=memory,size=4M");
  start();
  const auto refused = [&](int result) { return result == -1 && errno == EPERM; };
  EXPECT_TRUE(refused(::unlink(file("disk").c_str()))) << errno;
  EXPECT_TRUE(refused(::rename(file("disk").c_str(), file("x").c_str()))) << errno;
  EXPECT_TRUE(refused(::link(file("disk").c_str(), file("x").c_str()))) << errno;
  EXPECT_TRUE(refused(::symlink("disk", file("x").c_str()))) << errno;
  EXPECT_TRUE(refused(::mkdir(file("x").c_str(), 0700))) << errno;
  EXPECT_TRUE(refused(::open(file("x").c_str(), O_CREAT | O_RDWR, 0600))) << errno;
  EXPECT_TRUE(refused(::chmod(file("disk").c_str(), 0777))) << errno;
  EXPECT_EQ(::utimensat(AT_FDCWD, file("disk").c_str(), nullptr, 0), 0) << "touch is let pass";
  EXPECT_EQ(::access(file("nothing").c_str(), F_OK), -1);
  EXPECT_EQ(errno, ENOENT);
}

// Programs try what only block devices, or some file systems, understand. They go on after the
// errors that such a file has elsewhere, not after others.
TEST_F(FuseFileTest, WhatIsNotThereIsRefusedAsElsewhere) {
  add("disk", "driver=memory,size=4M");
  start();
  const auto fd = open("disk", O_RDWR);
  uint64_t range[2] = {0, 4096};
  for (const auto number :
       std::initializer_list<unsigned long>{BLKGETSIZE64, BLKDISCARD, BLKFLSBUF, FITRIM}) {
    EXPECT_EQ(::ioctl(fd.get(), number, range), -1);
    EXPECT_EQ(errno, ENOTTY) << std::hex << number;
  }
  EXPECT_EQ(::fsetxattr(fd.get(), "user.x", "1", 1, 0), -1);
  EXPECT_EQ(errno, EOPNOTSUPP);
  EXPECT_EQ(::open(dir_.path("mnt").c_str(), O_TMPFILE | O_RDWR, 0600), -1);
  EXPECT_EQ(errno, EOPNOTSUPP);
  const auto end = open("disk", O_WRONLY | O_APPEND);
  EXPECT_EQ(::write(end.get(), "x", 1), -1) << "behind the end";
  EXPECT_EQ(errno, ENOSPC);
}

TEST_F(FuseFileTest, FsyncFlushesAndSynchronousFilesWriteThrough) {
  const auto node = add_gated("disk");
  start();
  AlignedBytes bytes(4096, 1);
  {
    const auto fd = open("disk", O_RDWR);
    ASSERT_EQ(write_at(fd.get(), bytes.span(), 0), 4096);
    EXPECT_EQ(node->durable_writes(), 0);
    EXPECT_EQ(node->flushes(), 0);
    EXPECT_EQ(::fsync(fd.get()), 0);
    EXPECT_EQ(node->flushes(), 1);
    EXPECT_EQ(::fdatasync(fd.get()), 0);
    EXPECT_EQ(node->flushes(), 2);
  }
  const auto sync = open("disk", O_RDWR | O_DSYNC);
  ASSERT_EQ(write_at(sync.get(), bytes.span(), 0), 4096);
  EXPECT_EQ(node->durable_writes(), 1);
}

TEST_F(FuseFileTest, ErrorsOfTheNodeReachTheCaller) {
  const auto node = add_gated("disk");
  start();
  const auto fd = open("disk", O_RDWR);
  std::byte byte{};
  // ENOSYS from a flush would make the kernel report success for ever.
  const struct {
    int thrown;
    int seen;
  } cases[] = {{EIO, EIO}, {ENOSPC, ENOSPC}, {ENOSYS, EIO}, {EAGAIN, EIO}, {100000, EIO}};
  for (const auto& c : cases) {
    node->fail_with(c.thrown);
    EXPECT_EQ(::pread(fd.get(), &byte, 1, 0), -1);
    EXPECT_EQ(errno, c.seen);
    EXPECT_EQ(::pwrite(fd.get(), &byte, 1, 0), -1);
    EXPECT_EQ(errno, c.seen);
    EXPECT_EQ(::fsync(fd.get()), -1);
    EXPECT_EQ(errno, c.seen);
  }
  node->fail_with(0);
  EXPECT_EQ(::fsync(fd.get()), 0);
  EXPECT_EQ(node->flushes(), 1);
}

TEST_F(FuseFileTest, FilesComeAndGoWhileMounted) {
  add("first", "driver=memory,size=4M");
  start();
  add("second", "driver=memory,size=8M");
  EXPECT_TRUE(open("second", O_RDWR));
  on_loop([&] {
    EXPECT_THROW(
        mount_->add_file("bad/name",
                         graph_.attach("second", "x", block::Permissions::front_end(false)), {}),
        base::Error);
    EXPECT_THROW(mount_->remove_file("third", kLimit), base::Error);
    try {
      mount_->add_file("second", graph_.attach("second", "x", block::Permissions::front_end(false)),
                       {});
      ADD_FAILURE() << "two files of one name";
    } catch (const base::Error& e) {
      EXPECT_EQ(e.err(), EEXIST);
    }
    try {
      mount_->add_file("w", graph_.attach("second", "x", block::Permissions::front_end(false)),
                       {.writable = true});
      ADD_FAILURE() << "writable without the permission";
    } catch (const base::Error& e) {
      EXPECT_EQ(e.err(), EROFS);
    }
  });
  const auto fd = open("first", O_RDWR);
  const auto bytes = random_bytes(4096, 5);
  ASSERT_EQ(write_at(fd.get(), bytes, 0), 4096);
  on_loop([&] { mount_->remove_file("first", kLimit); });
  EXPECT_FALSE(open("first", O_RDONLY));
  EXPECT_EQ(errno, ENOENT);
  EXPECT_EQ(write_at(fd.get(), bytes, 0), -ENODEV) << "the export is gone, the descriptor not";
  // Another export of that name is another file.
  on_loop([&] {
    mount_->add_file("first", graph_.attach("second", "x", block::Permissions::front_end(false)),
                     {});
  });
  struct stat info {};
  ASSERT_EQ(::stat(file("first").c_str(), &info), 0);
  EXPECT_EQ(info.st_size, 8 << 20);
  EXPECT_EQ(write_at(fd.get(), bytes, 0), -ENODEV);
}

TEST_F(FuseFileTest, RemovingAFileThatHangsIsGivenUpAtTheDeadline) {
  const auto node = add_gated("disk");
  start();
  node->hold();
  auto fd = open("disk", O_RDWR);
  std::thread writer([&] {
    std::byte byte{};
    EXPECT_EQ(::pwrite(fd.get(), &byte, 1, 0), 1) << "it was taken, so it is finished";
  });
  ASSERT_TRUE(eventually([&] { return node->waiting() == 1; }));
  const auto before = base::Clock::now();
  on_loop([&] {
    try {
      mount_->remove_file("disk", std::chrono::milliseconds(100));
      ADD_FAILURE() << "it is in use";
    } catch (const base::Error& e) {
      EXPECT_EQ(e.err(), ETIMEDOUT);
      EXPECT_THAT(e.what(), testing::HasSubstr("'disk'"));
    }
  });
  EXPECT_LT(base::Clock::now() - before, std::chrono::seconds(3));
  EXPECT_FALSE(open("disk", O_RDONLY));
  node->let_go();
  writer.join();
  fd.reset();
  EXPECT_TRUE(eventually([&] { return node->users().empty(); })) << "closed in the end";
}

TEST_F(FuseFileTest, RemovingAFileWhoseFlushHangsIsGivenUpAtTheDeadline) {
  const auto node = add_gated("disk");
  start();
  {
    const auto fd = open("disk", O_RDWR);
    ASSERT_EQ(write_at(fd.get(), random_bytes(4096, 5), 0), 4096);
  }
  node->hold();
  const auto before = base::Clock::now();
  on_loop([&] {
    try {
      mount_->remove_file("disk", std::chrono::milliseconds(100));
      ADD_FAILURE() << "it was not flushed";
    } catch (const base::Error& e) {
      EXPECT_EQ(e.err(), ETIMEDOUT);
    }
  });
  EXPECT_LT(base::Clock::now() - before, std::chrono::seconds(3));
  node->let_go();
  EXPECT_TRUE(eventually([&] { return node->users().empty(); })) << "closed in the end";
}

TEST_F(FuseFileTest, AChangedSizeIsSeenAtOnce) {
  const std::string path = dir_.path("image");
  ASSERT_EQ(run({"truncate", "-s", "1M", path}), 0);
  on_loop([&] {
    graph_.add(block::Options::from_text("driver=file,node-name=disk,filename=" + path));
    mount_->add_file("disk",
                     graph_.attach("disk", "FUSE",
                                   {block::Permissions::kWrite,
                                    block::Permissions::kWrite | block::Permissions::kResize}),
                     {.writable = true});
  });
  start();
  const auto fd = open("disk", O_RDWR);
  on_loop([&] {
    auto handle = graph_.attach(
        "disk", "control plane",
        {block::Permissions::kWrite | block::Permissions::kResize, block::Permissions::kWrite});
    handle.truncate(2 << 20);
    handle.close();
  });
  struct stat info {};
  ASSERT_EQ(::fstat(fd.get(), &info), 0);
  EXPECT_EQ(info.st_size, 2 << 20);
  const std::vector<std::byte> bytes(100, std::byte{7});
  EXPECT_EQ(write_at(fd.get(), bytes, (2 << 20) - 100), 100);
  EXPECT_EQ(read_at(fd.get(), 100, (2 << 20) - 100), bytes);
}

TEST_F(FuseFileTest, StateIsDescribed) {
  add("disk", "driver=memory,size=4M");
  EXPECT_THAT(mount_->describe()[0], testing::HasSubstr("not mounted yet"));
  start();
  const auto fd = open("disk", O_RDWR);
  const auto lines = mount_->describe();
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_THAT(lines[0], testing::HasSubstr(": mounted, "));
  EXPECT_THAT(lines[1], testing::HasSubstr("'disk': 4194304 bytes, writable, open 1 times"));
}

}  // namespace
}  // namespace minivmm::fuse
