// SPDX-License-Identifier: Apache-2.0
// Files of the host: who may open one twice, what a descriptor carries, locks, devices.
#include "block/protocols/host_file.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <optional>

#include <fmt/core.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/unique_fd.h"
#include "block/graph/open_policy.h"
#include "block/protocols/file_lock.h"
#include "tests/unit/block/graph_fixture.h"
#include "tests/unit/block/temp_directory.h"

namespace minivmm::block {
namespace {

using base::SingleBuffer;
using base::UniqueFd;
using testing::HasSubstr;

class HostFileTest : public GraphTest {
 protected:
  void add(const std::string& keys) {
    on_fiber([&] { graph_.add(Options::from_keys(keys)); });
  }
  std::string refusal(const std::string& keys) {
    return on_fiber([&] { return error_text([&] { graph_.add(Options::from_keys(keys)); }); });
  }
  static HostFileOptions by_number(const UniqueFd& fd) {
    HostFileOptions options;
    options.opener = "a test";
    options.fd = fd.get();
    return options;
  }

  TempDirectory files_;
};

std::string raw_on(const std::string& node, const std::string& path, const std::string& more = "") {
  return fmt::format("driver=raw,node-name={},file.driver=file,file.filename={}{}", node, path,
                     more);
}

// The check of a name that an image records and the opening are two moments; whoever owns the
// directory may put a link to a file of others in between.
TEST_F(HostFileTest, AFileThatReplacedTheCheckedOneIsNotOpened) {
  const std::string base = files_.write("base", std::string(4096, 'b'));
  const std::string secret = files_.write("secret", std::string(4096, 's'));
  Options checked = backing_options({}, files_ / "top.qcow2", "base", "raw");
  const std::string inode = checked.take_string("file.inode").value_or("");
  EXPECT_EQ(refusal(raw_on("fine", base, ",file.inode=" + inode)), "");
  std::filesystem::remove(base);
  std::filesystem::create_symlink(secret, base);
  EXPECT_THAT(refusal(raw_on("swapped", base, ",file.inode=" + inode)),
              HasSubstr("was replaced by another file"));
}

TEST_F(HostFileTest, AFileOpenedTwiceNamesTheNodeThatHasIt) {
  const std::string disk = files_.write("disk", std::string(4096, 'x'));
  std::filesystem::create_hard_link(disk, files_ / "link");
  add(raw_on("a", disk));
  EXPECT_EQ(refusal(raw_on("b", disk)),
            disk +
                ": is already open for writing by node 'a.file'; share one node instead of "
                "opening the file twice");
  // By another name it is the same file.
  EXPECT_THAT(refusal(raw_on("b", files_ / "link", ",read-only=on")),
              HasSubstr("link: is the same file as " + disk +
                        ", which is already open for writing by node 'a.file', so its content"));
}

TEST_F(HostFileTest, ReadersShareAFileAndAreNamedWhileTheyHaveIt) {
  const std::string disk = files_.write("disk", std::string(4096, 'x'));
  add(raw_on("a", disk, ",read-only=on"));
  add(raw_on("b", disk, ",read-only=on"));
  EXPECT_THAT(
      refusal(raw_on("w", disk)),
      HasSubstr("is already open read-only by node 'a.file' and node 'b.file', which needs"));
  on_fiber([&] { graph_.remove("a"); });
  EXPECT_THAT(refusal(raw_on("w", disk)), HasSubstr("read-only by node 'b.file', which needs"));
  on_fiber([&] { graph_.remove("b"); });
  EXPECT_EQ(refusal(raw_on("w", disk)), "");
}

// io_uring reads the flag as "fail rather than wait", or believes that the file never waits.
TEST_F(HostFileTest, DescriptorsDoNotKeepNonblock) {
  const std::string disk = files_.write("disk", std::string(4096, 'x'));
  {
    HostFileOptions options;
    options.filename = disk;
    const auto file = HostFile::open(options);
    EXPECT_EQ(::fcntl(file->fd(), F_GETFL) & O_NONBLOCK, 0);
  }
  const UniqueFd given(::open(disk.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  const auto file = HostFile::open(by_number(given));
  EXPECT_EQ(::fcntl(file->fd(), F_GETFL) & O_NONBLOCK, 0);
}

TEST_F(HostFileTest, AFifoOfThatNameIsRefusedAndHoldsNobodyUp) {
  ASSERT_EQ(::mkfifo((files_ / "fifo").c_str(), 0600), 0);
  EXPECT_THAT(refusal(raw_on("a", files_ / "fifo", ",read-only=on")),
              HasSubstr("neither a regular file nor a block device"));
}

TEST_F(HostFileTest, DescriptorsByNumberAreCheckedAndNamed) {
  const std::string disk = files_.write("disk", std::string(8192, 'x'));
  const UniqueFd reading(::open(disk.c_str(), O_RDONLY | O_CLOEXEC));
  const UniqueFd writing(::open(disk.c_str(), O_WRONLY | O_CLOEXEC));
  const auto node = [](int fd) { return fmt::format("driver=file,node-name=n,fd={}", fd); };
  EXPECT_THAT(refusal(node(reading.get())), HasSubstr("is not open for reading and writing"));
  EXPECT_THAT(refusal(node(writing.get()) + ",read-only=on"), HasSubstr("is not open for reading"));
  EXPECT_THAT(refusal(node(1 << 20)), HasSubstr("file descriptor 1048576: Bad file descriptor"));
  add(raw_on("a", disk));
  EXPECT_THAT(refusal(node(reading.get()) + ",read-only=on"),
              HasSubstr(fmt::format("file descriptor {}: is the same file as {}, which is already "
                                    "open for writing by node 'a.file'",
                                    reading.get(), disk)));
}

TEST_F(HostFileTest, DirectIsSetOnAnInheritedDescriptorNotForgotten) {
  const std::string disk = files_.write("disk", std::string(8192, 'x'));
  if (!UniqueFd(::open(disk.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC))) {
    GTEST_SKIP() << "this file system has no O_DIRECT";
  }
  const UniqueFd given(::open(disk.c_str(), O_RDONLY | O_CLOEXEC));
  HostFileOptions options = by_number(given);
  options.direct = true;
  EXPECT_TRUE(HostFile::open(options)->direct());
  EXPECT_NE(::fcntl(given.get(), F_GETFL) & O_DIRECT, 0);
}

TEST_F(HostFileTest, ARefusedOpenLeavesASharedDescriptorAsItIs) {
  const std::string disk = files_.write("disk", std::string(8192, 'x'));
  const UniqueFd given(::open(disk.c_str(), O_RDONLY | O_CLOEXEC));
  const auto buffered = HostFile::open(by_number(given));
  HostFileOptions options = by_number(given);
  options.direct = true;
  EXPECT_THAT(error_text([&] { HostFile::open(options); }), HasSubstr("with another cache mode"));
  // The two descriptors are one open file: the flag would have changed the first user's too.
  EXPECT_EQ(::fcntl(buffered->fd(), F_GETFL) & O_DIRECT, 0);
}

TEST_F(HostFileTest, LocksOfAnInheritedDescriptorEndWithItsUse) {
  const std::string disk = files_.write("disk", std::string(8192, 'x'));
  const UniqueFd given(
      ::open(disk.c_str(), O_RDWR | O_CLOEXEC));  // stays open, as a parent's would
  const UniqueFd other(::open(disk.c_str(), O_RDWR | O_CLOEXEC));
  {
    HostFileOptions options = by_number(given);
    options.writable = true;
    const auto file = HostFile::open(options);
    EXPECT_EQ(error_number([&] { lock_image_file(other.get(), disk, {.writes = true}); }), EBUSY);
  }
  EXPECT_EQ(error_text([&] { lock_image_file(other.get(), disk, {.writes = true}); }), "");
}

bool is_locked(int other) {
  struct flock range {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  EXPECT_EQ(::fcntl(other, F_OFD_GETLK, &range), 0);
  return range.l_type != F_UNLCK;
}

// The kernel may have references of its own to what was open, for a while.
TEST_F(HostFileTest, LocksEndWithTheFileAndNotWithTheLastReferenceToIt) {
  const std::string disk = files_.write("disk", std::string(8192, 'x'));
  const UniqueFd other(::open(disk.c_str(), O_RDWR | O_CLOEXEC));
  UniqueFd left;
  {
    HostFileOptions options;
    options.opener = "a test";
    options.filename = disk;
    options.writable = true;
    const auto file = HostFile::open(options);
    left.reset(::fcntl(file->fd(), F_DUPFD_CLOEXEC, 3));
    EXPECT_TRUE(is_locked(other.get()));
  }
  EXPECT_FALSE(is_locked(other.get()));
}

TEST_F(HostFileTest, SizesThatNoDiskMayHaveAreRefused) {
  const TempDirectory memory("/dev/shm");
  const std::string huge = memory.write("huge", "");
  if (::truncate(huge.c_str(), INT64_MAX) != 0) GTEST_SKIP() << "no such files here";
  EXPECT_THAT(refusal(raw_on("a", huge)), HasSubstr("larger than any disk may be"));
}

// A loop device on a file; nothing where this machine gives none.
class LoopDevice {
 public:
  explicit LoopDevice(const std::string& file) {
    const UniqueFd control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
    const UniqueFd backing(::open(file.c_str(), O_RDWR | O_CLOEXEC));
    if (!control || !backing) return;
    for (int tries = 0; tries < 10 && path_.empty(); ++tries) {
      const int number = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
      if (number < 0) return;
      const std::string path = fmt::format("/dev/loop{}", number);
      fd_.reset(::open(path.c_str(), O_RDWR | O_CLOEXEC));
      // Another process may have taken it meanwhile.
      if (fd_ && ::ioctl(fd_.get(), LOOP_SET_FD, backing.get()) == 0) path_ = path;
    }
  }
  ~LoopDevice() {
    if (!path_.empty()) ::ioctl(fd_.get(), LOOP_CLR_FD);
  }
  LoopDevice(const LoopDevice&) = delete;
  LoopDevice& operator=(const LoopDevice&) = delete;
  const std::string& path() const { return path_; }

 private:
  UniqueFd fd_;
  std::string path_;
};

class DeviceTest : public HostFileTest {
 protected:
  void SetUp() override {
    device_.emplace(files_.write("backing", std::string(kSize, 'x')));
    if (device_->path().empty()) GTEST_SKIP() << "no loop devices here";
  }
  static constexpr uint64_t kSize = 1 << 20;
  std::optional<LoopDevice> device_;
};

TEST_F(DeviceTest, RequestsOfAnySizeReachABlockDevice) {
  for (const char* cache : {"off", "on"}) {
    add(raw_on("d", device_->path(), fmt::format(",file.cache.direct={}", cache)));
    on_fiber([&] {
      Handle handle = graph_.attach("d", "tester", Permissions::front_end(true));
      EXPECT_EQ(handle.size(), kSize);
      std::string pattern(5000, 'p');
      handle.write(1234, SingleBuffer(pattern.data(), pattern.size()));
      handle.write_zeroes(2000, 100);  // a device takes whole sectors only
      handle.write_zeroes(65536, 65536, {.may_unmap = true});
      handle.discard(262144, 65536);
      handle.flush();
      std::string got(131072, '?');
      handle.read(0, SingleBuffer(got.data(), got.size()));
      std::string want(131072, 'x');
      want.replace(1234, 5000, pattern)
          .replace(2000, 100, 100, '\0')
          .replace(65536, 65536, 65536, '\0');
      EXPECT_TRUE(got == want) << "cache.direct=" << cache;
      handle.close();
      graph_.remove("d");
    });
    // Back to what it was, through another description: buffers are the device's.
    const UniqueFd fd(::open(device_->path().c_str(), O_RDWR | O_CLOEXEC));
    const std::string fill(kSize, 'x');
    ASSERT_EQ(::pwrite(fd.get(), fill.data(), fill.size(), 0), static_cast<ssize_t>(kSize));
    ASSERT_EQ(::fsync(fd.get()), 0);
  }
}

// QEMU locks host devices as it locks files.
TEST_F(DeviceTest, BlockDevicesCarryLocksToo) {
  add(raw_on("d", device_->path()));
  const UniqueFd other(::open(device_->path().c_str(), O_RDWR | O_CLOEXEC));
  EXPECT_EQ(error_number([&] { lock_image_file(other.get(), "other", {.writes = true}); }), EBUSY);
}

}  // namespace
}  // namespace minivmm::block
