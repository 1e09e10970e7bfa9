// SPDX-License-Identifier: Apache-2.0
// One view of the data: what any user of the node writes is what every reader of the file gets
// next.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include <gtest/gtest.h>

#include "base/error.h"
#include "fuse_fixture.h"

namespace minivmm::fuse {
namespace {

// The thread that drops mapped pages runs in this process.
bool invalidator_runs() {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(task.path() / "comm"), name);
    if (name == "fuse-invalidate") return true;
  }
  return false;
}

class FuseCoherenceTest : public FuseTest {
 protected:
  void write_through(block::Handle& handle, uint64_t offset, std::span<const std::byte> bytes) {
    on_loop([&] { handle.write(offset, base::SingleBuffer(bytes)); });
  }
};

TEST_F(FuseCoherenceTest, WritesOfAnotherUserAreReadAtOnce) {
  add("disk", "driver=memory,size=4M");
  start();
  handles_.push_back(attach("disk"));
  const auto fd = open("disk", O_RDWR);
  std::vector<std::byte> in(4096);
  // Read before each write: a page that was cached then would be stale now.
  for (int round = 1; round <= 50; ++round) {
    ASSERT_EQ(::pread(fd.get(), in.data(), in.size(), 8192), 4096);
    const std::vector<std::byte> out(4096, static_cast<std::byte>(round));
    write_through(handles_[0], 8192, out);
    ASSERT_EQ(::pread(fd.get(), in.data(), in.size(), 8192), 4096);
    ASSERT_EQ(in, out) << "round " << round;
  }
  // What is not mapped must not cost other users anything.
  EXPECT_TRUE(eventually([] { return !invalidator_runs(); }));
}

TEST_F(FuseCoherenceTest, AnotherUserReadsAtOnceWhatTheFileWasWritten) {
  add("disk", "driver=memory,size=4M");
  start();
  handles_.push_back(attach("disk", false));
  const auto fd = open("disk", O_RDWR);
  for (int round = 1; round <= 50; ++round) {
    const std::vector<std::byte> out(5000, static_cast<std::byte>(round));
    ASSERT_EQ(::pwrite(fd.get(), out.data(), out.size(), 77), 5000);
    std::vector<std::byte> in(5000);
    on_loop([&] { handles_[0].read(77, base::SingleBuffer(std::span(in))); });
    ASSERT_EQ(in, out) << "round " << round;
  }
}

TEST_F(FuseCoherenceTest, TwoFilesOfOneNodeShowOneContent) {
  add("disk", "driver=memory,size=4M");
  on_loop([&] {
    mount_->add_file("again", graph_.attach("disk", "second", block::Permissions::front_end(false)),
                     {});
  });
  start();
  const auto writer = open("disk", O_RDWR);
  const auto reader = open("again", O_RDONLY);
  for (int round = 1; round <= 20; ++round) {
    const std::vector<std::byte> out(4096, static_cast<std::byte>(round));
    ASSERT_EQ(::pwrite(writer.get(), out.data(), out.size(), 0), 4096);
    std::vector<std::byte> in(4096);
    ASSERT_EQ(::pread(reader.get(), in.data(), in.size(), 0), 4096);
    ASSERT_EQ(in, out);
  }
}

class FuseMappingTest : public FuseCoherenceTest {
 protected:
  static constexpr size_t kMapped = 65536;
  void SetUp() override {
    FuseCoherenceTest::SetUp();
    if (IsSkipped()) return;
    add("disk", "driver=memory,size=4M");
    start();
    fd_ = open("disk", O_RDWR);
    void* const mapped = ::mmap(nullptr, kMapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    if (mapped == MAP_FAILED && errno == ENODEV) {
      GTEST_SKIP() << "this kernel does not map files that are opened with direct I/O";
    }
    ASSERT_NE(mapped, MAP_FAILED) << std::strerror(errno);
    bytes_ = static_cast<volatile std::byte*>(mapped);
  }
  void TearDown() override {
    if (bytes_ != nullptr) ::munmap(const_cast<std::byte*>(bytes_), kMapped);
    fd_.reset();
    FuseCoherenceTest::TearDown();
  }

  base::UniqueFd fd_;
  volatile std::byte* bytes_ = nullptr;
};

TEST_F(FuseMappingTest, SeesWritesThroughADescriptor) {
  const auto other = open("disk", O_RDWR);
  for (int round = 1; round <= 20; ++round) {
    const auto value = static_cast<std::byte>(round);
    EXPECT_FALSE(bytes_[5000] == value);
    const std::vector<std::byte> out(4096, value);
    ASSERT_EQ(::pwrite(other.get(), out.data(), out.size(), 4096), 4096);
    ASSERT_TRUE(bytes_[5000] == value) << "round " << round;
  }
}

// Direct I/O does not help a mapping: its pages have to be dropped.
TEST_F(FuseMappingTest, SeesWritesOfAnotherUserAtOnce) {
  handles_.push_back(attach("disk"));
  for (int round = 1; round <= 100; ++round) {
    const auto value = static_cast<std::byte>(round);
    EXPECT_FALSE(bytes_[5000] == value);
    const std::vector<std::byte> out(100, value);
    write_through(handles_[0], 4950, out);
    ASSERT_TRUE(bytes_[5000] == value) << "round " << round;
  }
  EXPECT_TRUE(invalidator_runs());
  on_loop([&] { handles_[0].write_zeroes(4096, 4096); });
  EXPECT_TRUE(bytes_[5000] == std::byte{0});
}

// Faults, writes by another user and writes through a descriptor, all at once and of the same
// pages: nothing may wait for itself, and the last write is what is seen.
TEST_F(FuseMappingTest, ManyUsersOfMappedPagesDoNotBlockEachOther) {
  handles_.push_back(attach("disk"));
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  std::atomic<unsigned> sum{0};
  for (int i = 0; i < 4; ++i) {
    readers.emplace_back([&, i] {
      for (size_t at = static_cast<size_t>(i); !done; at = (at + 4099) % kMapped) {
        sum += static_cast<unsigned>(bytes_[at]);
      }
    });
  }
  std::thread descriptor([&] {
    const std::vector<std::byte> out(8192, std::byte{2});
    for (off_t at = 0; !done; at = (at + 8192) % static_cast<off_t>(kMapped)) {
      EXPECT_EQ(::pwrite(fd_.get(), out.data(), out.size(), at), 8192);
    }
  });
  on_loop([&] {
    base::WaitGroup writers;
    writers.add(8);
    for (int i = 0; i < 8; ++i) {
      loops_.loop(static_cast<size_t>(i) % 2).post("writer", [&, i] {
        const std::vector<std::byte> out(4096, std::byte{1});
        for (uint64_t n = 0; n < 50; ++n) {
          handles_[0].write((n * 8 + static_cast<uint64_t>(i)) % 16 * 4096,
                            base::SingleBuffer(std::span(out)));
        }
        writers.done();
      });
    }
    writers.wait();
  });
  done = true;
  descriptor.join();
  for (std::thread& reader : readers) reader.join();
  const std::vector<std::byte> last(kMapped, std::byte{7});
  write_through(handles_[0], 0, last);
  for (size_t at = 0; at < kMapped; at += 1000) ASSERT_TRUE(bytes_[at] == std::byte{7}) << at;
}

// Once nobody has the file open, writers need not tell the kernel any more.
TEST_F(FuseMappingTest, IsForgottenAfterTheLastClose) {
  handles_.push_back(attach("disk"));
  const std::vector<std::byte> out(100, std::byte{1});
  EXPECT_TRUE(bytes_[0] == std::byte{0});
  ::munmap(const_cast<std::byte*>(bytes_), kMapped);
  bytes_ = nullptr;
  fd_.reset();
  ASSERT_TRUE(
      eventually([&] { return mount_->describe()[1].find("open 0 times") != std::string::npos; }));
  write_through(handles_[0], 0, out);
  // A new mapping starts with what is there now.
  fd_ = open("disk", O_RDONLY);
  void* const mapped = ::mmap(nullptr, kMapped, PROT_READ, MAP_SHARED, fd_.get(), 0);
  ASSERT_NE(mapped, MAP_FAILED);
  bytes_ = static_cast<volatile std::byte*>(mapped);
  EXPECT_TRUE(bytes_[0] == std::byte{1});
  write_through(handles_[0], 0, std::vector<std::byte>(100, std::byte{2}));
  EXPECT_TRUE(bytes_[0] == std::byte{2});
}

TEST_F(FuseMappingTest, IsSeenByDescriptorsAndAfterMsyncByOthers) {
  handles_.push_back(attach("disk", false));
  const auto other = open("disk", O_RDWR);
  for (int round = 1; round <= 20; ++round) {
    const auto value = static_cast<std::byte>(round);
    bytes_[5000] = value;
    std::byte in{};
    ASSERT_EQ(::pread(other.get(), &in, 1, 5000), 1);
    ASSERT_EQ(in, value) << "round " << round;
    bytes_[9000] = value;
    ASSERT_EQ(::msync(const_cast<std::byte*>(bytes_), kMapped, MS_SYNC), 0);
    on_loop([&] { handles_[0].read(9000, base::SingleBuffer(&in, 1)); });
    ASSERT_EQ(in, value) << "round " << round;
  }
}

}  // namespace
}  // namespace minivmm::fuse
