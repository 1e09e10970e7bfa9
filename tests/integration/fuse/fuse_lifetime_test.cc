// SPDX-License-Identifier: Apache-2.0
// How a mount begins and ends, whatever happens.
#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "child.h"
#include "fuse_fixture.h"

namespace minivmm::fuse {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

class FuseLifetimeTest : public FuseTest {
 protected:
  // The message of what starting throws; empty if it works.
  std::string start_error(Mount& mount) {
    // Caught where it is thrown: ThreadSanitizer does not see the reference count of an exception
    // that another thread reads.
    return on_loop([&]() -> std::string {
      try {
        mount.start();
        return {};
      } catch (const base::Error& e) {
        return e.what();
      }
    });
  }
};

TEST_F(FuseLifetimeTest, MakesTheDirectoryAndTakesItAwayAgain) {
  add("disk", "driver=memory,size=4M");
  EXPECT_NE(::access(dir_.path("mnt").c_str(), F_OK), 0);
  start();
  // Usable at once.
  EXPECT_TRUE(open("disk", O_RDWR));
  EXPECT_THAT(stop(), testing::IsEmpty());
  EXPECT_NE(::access(dir_.path("mnt").c_str(), F_OK), 0);
  EXPECT_THAT(stop(), testing::IsEmpty()) << "twice is harmless";
}

TEST_F(FuseLifetimeTest, KeepsADirectoryThatWasThere) {
  ASSERT_EQ(::mkdir(dir_.path("mnt").c_str(), 0755), 0);
  add("disk", "driver=memory,size=4M");
  start();
  EXPECT_THAT(stop(), testing::IsEmpty());
  EXPECT_EQ(::access(dir_.path("mnt").c_str(), F_OK), 0);
}

TEST_F(FuseLifetimeTest, RefusesWhatItShouldNotMountOn) {
  const std::string point = dir_.path("mnt");
  ASSERT_EQ(::mkdir(point.c_str(), 0755), 0);
  std::ofstream(point + "/precious") << "data";
  EXPECT_THAT(start_error(*mount_), HasSubstr("not empty"));
  std::filesystem::remove_all(point);
  std::ofstream(point) << "a file";
  EXPECT_THAT(start_error(*mount_), HasSubstr("not a directory"));
  std::filesystem::remove(point);
  mount_ = std::make_unique<Mount>(loops_, dir_.path("no/such"));
  EXPECT_THAT(start_error(*mount_), HasSubstr("parent directory"));
  mount_ = std::make_unique<Mount>(loops_, point);
  EXPECT_EQ(start_error(*mount_), "");
}

TEST_F(FuseLifetimeTest, ThePathMeansWhatTheSystemTakesItFor) {
  std::filesystem::create_directories(dir_.path("other/deep"));
  std::filesystem::create_directory_symlink(dir_.path("other/deep"), dir_.path("link"));
  // Read as text it would be "mnt" beside the link.
  mount_ = std::make_unique<Mount>(loops_, dir_.path("link/../mnt/."));
  add("disk", "driver=memory,size=4M");
  start();
  EXPECT_TRUE(is_mounted(dir_.path("other/mnt")));
  EXPECT_THAT(stop(), testing::IsEmpty());
  // A link to the mountpoint, and one that ends in "..".
  std::filesystem::create_directory_symlink("deep/..", dir_.path("other/up"));
  for (const char* const path : {"link/.", "other/up/deep/", "other/deep/../up/deep"}) {
    mount_ = std::make_unique<Mount>(loops_, dir_.path(path));
    stopped_ = false;
    start();
    EXPECT_TRUE(is_mounted(dir_.path("other/deep"))) << path;
    EXPECT_THAT(stop(), testing::IsEmpty());
  }
}

TEST_F(FuseLifetimeTest, RefusesALiveMountByName) {
  add("disk", "driver=memory,size=4M");
  start();
  Mount second(loops_, dir_.path("mnt") + "/");
  EXPECT_THAT(start_error(second),
              testing::AllOf(HasSubstr("minivmm:" + std::to_string(::getpid())),
                             HasSubstr("is mounted there and alive")));
  EXPECT_TRUE(open("disk", O_RDWR)) << "the first one lives on";
}

TEST_F(FuseLifetimeTest, ADiedServersMountIsTakenOver) {
  const std::string image = dir_.path("image");
  ASSERT_EQ(run({"truncate", "-s", "4M", image}), 0);
  const std::vector<std::string> arguments{FUSE_SERVER, dir_.path("mnt"), "2",
                                           "+disk=driver=file,filename=" + image};
  const std::vector<std::byte> bytes(4096, std::byte{9});
  // Twice: the directory of the first round is there in the second.
  for (int round = 0; round < 3; ++round) {
    Child server(arguments);
    ASSERT_TRUE(server.wait_for("ready")) << server.output();
    const auto fd = open("disk", O_RDWR);
    ASSERT_TRUE(fd) << std::strerror(errno);
    std::vector<std::byte> in(4096);
    ASSERT_EQ(::pread(fd.get(), in.data(), in.size(), 0), 4096);
    EXPECT_TRUE(round == 0 || in == bytes);
    ASSERT_EQ(::pwrite(fd.get(), bytes.data(), bytes.size(), 0), 4096);
    // A write in flight as it dies ends, in whatever way.
    std::atomic<bool> go_on{true};
    std::thread writer([&] {
      while (go_on && ::pwrite(fd.get(), bytes.data(), bytes.size(), 0) == 4096) {
      }
    });
    EXPECT_EQ(server.end(SIGKILL), 1000 + SIGKILL);
    writer.join();
    struct stat info {};
    EXPECT_EQ(::stat(dir_.path("mnt").c_str(), &info), -1);
    EXPECT_EQ(errno, ENOTCONN);
  }
  Child server(arguments);
  ASSERT_TRUE(server.wait_for("ready")) << server.output();
  EXPECT_EQ(server.end(SIGTERM), 0);
  EXPECT_FALSE(is_mounted(dir_.path("mnt")));
}

TEST_F(FuseLifetimeTest, SigtermEndsCleanlyWithFilesOpen) {
  Child server({FUSE_SERVER, dir_.path("mnt"), "2", "+disk=driver=memory,size=4M"});
  ASSERT_TRUE(server.wait_for("ready")) << server.output();
  const auto fd = open("disk", O_RDWR);
  ASSERT_TRUE(fd);
  EXPECT_EQ(server.end(SIGTERM), 0) << server.output();
  EXPECT_THAT(server.output(), HasSubstr("in use"));
  EXPECT_FALSE(is_mounted(dir_.path("mnt")));
  EXPECT_NE(::access(dir_.path("mnt").c_str(), F_OK), 0);
  std::byte byte{};
  EXPECT_EQ(::pread(fd.get(), &byte, 1, 0), -1) << "nobody serves it any more";
}

TEST_F(FuseLifetimeTest, RequestsInFlightFinishBeforeTheEnd) {
  const auto node = add_gated("disk");
  start();
  const auto fd = open("disk", O_RDWR);
  node->hold();
  ssize_t result = 0;
  std::byte byte{};
  std::thread writer([&] { result = ::pwrite(fd.get(), &byte, 1, 0); });
  ASSERT_TRUE(eventually([&] { return node->waiting() == 1; }));
  std::thread release([&] {
    std::this_thread::sleep_for(milliseconds(300));
    node->let_go();
  });
  EXPECT_THAT(stop(), testing::IsEmpty());
  writer.join();
  release.join();
  EXPECT_EQ(result, 1) << "a write that was taken must be answered";
}

TEST_F(FuseLifetimeTest, AHangingDiskIsNamedAndItsUsersAreLetGo) {
  const auto node = add_gated("disk");
  start();
  node->hold();
  int error = 0;
  {
    const auto fd = open("disk", O_RDWR);
    std::byte byte{};
    std::thread writer([&] { error = ::pwrite(fd.get(), &byte, 1, 4711) < 0 ? errno : 0; });
    ASSERT_TRUE(eventually([&] { return node->waiting() == 1; }));
    const auto before = base::Clock::now();
    const auto troubles = stop(milliseconds(300));
    EXPECT_LT(base::Clock::now() - before, milliseconds(3000));
    EXPECT_THAT(troubles, testing::Contains(HasSubstr("'disk': write of 1 bytes at 4711")));
    writer.join();
  }
  EXPECT_NE(error, 0);
  EXPECT_FALSE(is_mounted(dir_.path("mnt")));
  // What was stuck ends after all: now everything is freed, and the graph can close.
  node->let_go();
  mount_.reset();
  EXPECT_TRUE(eventually([&] { return node->users().empty(); }));
}

TEST_F(FuseLifetimeTest, AForgottenStopIsMadeUpFor) {
  add("disk", "driver=memory,size=4M");
  start();
  EXPECT_TRUE(is_mounted(dir_.path("mnt")));
  mount_.reset();
  stopped_ = true;
  EXPECT_FALSE(is_mounted(dir_.path("mnt")));
}

TEST_F(FuseLifetimeTest, UnmountingFromOutsideIsNoticed) {
  std::atomic<int> noticed{0};
  on_loop([&] { mount_->on_unmounted([&] { ++noticed; }); });
  add("disk", "driver=memory,size=4M");
  start();
  const bool by_root = ::geteuid() == 0;
  ASSERT_EQ(run({by_root ? "umount" : "fusermount3", by_root ? "-n" : "-u", dir_.path("mnt")}), 0);
  EXPECT_TRUE(eventually([&] { return noticed == 1; }));
  EXPECT_THAT(mount_->describe()[0], HasSubstr("unmounted by somebody else"));
  EXPECT_THAT(stop(), testing::IsEmpty());
  EXPECT_EQ(noticed, 1);
  EXPECT_NE(::access(dir_.path("mnt").c_str(), F_OK), 0) << "what it made it takes away";
}

TEST_F(FuseLifetimeTest, AnotherMountAtThePlaceIsLeftAlone) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root";
  const std::string point = dir_.path("mnt");
  ASSERT_EQ(::mkdir(point.c_str(), 0755), 0);
  add("disk", "driver=memory,size=4M");
  start();
  ASSERT_EQ(run({"umount", point}), 0);
  if (::mount("none", point.c_str(), "tmpfs", 0, nullptr) != 0) GTEST_SKIP() << "no tmpfs here";
  EXPECT_THAT(stop(), testing::IsEmpty());
  EXPECT_TRUE(is_mounted(point));
  EXPECT_EQ(::umount2(point.c_str(), MNT_DETACH), 0);
}

TEST_F(FuseLifetimeTest, DirtyMappedPagesAreWrittenBeforeABusyMountIsDetached) {
  add("disk", "driver=memory,size=4M");
  handles_.push_back(attach("disk", false));
  start();
  // A child maps, changes and keeps the file busy: unmapping would write back by itself.
  Child child({FUSE_MAPPER, file("disk")});
  const std::string mapped = child.next_line();
  if (mapped == "unsupported") GTEST_SKIP() << "this kernel does not map such files";
  ASSERT_EQ(mapped, "mapped");
  ASSERT_EQ(child.ask("put 12345 119"), "0");
  EXPECT_THAT(stop(), testing::IsEmpty());
  std::byte byte{};
  on_loop([&] { handles_[0].read(12345, base::SingleBuffer(&byte, 1)); });
  EXPECT_EQ(byte, std::byte{0x77});
}

}  // namespace
}  // namespace minivmm::fuse
