// SPDX-License-Identifier: Apache-2.0
// One view of the data: what any user of the node writes is what every reader of the file gets
// next.
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include <gtest/gtest.h>

#include "base/error.h"
#include "child.h"
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

// The mapping is another process's, see fuse_mapper.cc.
class FuseMappingTest : public FuseCoherenceTest {
 protected:
  static constexpr size_t kMapped = 65536;
  void SetUp() override {
    FuseCoherenceTest::SetUp();
    if (IsSkipped()) return;
    add("disk", "driver=memory,size=4M");
    start();
    map();
  }
  void map() {
    mapper_ = std::make_unique<Child>(std::vector<std::string>{FUSE_MAPPER, file("disk")});
    const std::string answer = mapper_->next_line();
    if (answer == "unsupported") {
      GTEST_SKIP() << "this kernel does not map files that are opened with direct I/O";
    }
    ASSERT_EQ(answer, "mapped");
  }
  void TearDown() override {
    mapper_.reset();
    FuseCoherenceTest::TearDown();
  }
  int mapped_byte(size_t place) { return std::stoi(mapper_->ask("get " + std::to_string(place))); }
  void set_mapped_byte(size_t place, int value) {
    EXPECT_EQ(mapper_->ask("put " + std::to_string(place) + " " + std::to_string(value)), "0");
  }

  std::unique_ptr<Child> mapper_;
};

TEST_F(FuseMappingTest, SeesWritesThroughADescriptor) {
  const auto other = open("disk", O_RDWR);
  for (int round = 1; round <= 20; ++round) {
    EXPECT_EQ(mapped_byte(5000), round - 1);
    const std::vector<std::byte> out(4096, static_cast<std::byte>(round));
    ASSERT_EQ(::pwrite(other.get(), out.data(), out.size(), 4096), 4096);
    ASSERT_EQ(mapped_byte(5000), round);
  }
}

// Direct I/O does not help a mapping: its pages have to be dropped.
TEST_F(FuseMappingTest, SeesWritesOfAnotherUserAtOnce) {
  handles_.push_back(attach("disk"));
  for (int round = 1; round <= 100; ++round) {
    EXPECT_EQ(mapped_byte(5000), round - 1);
    const std::vector<std::byte> out(100, static_cast<std::byte>(round));
    write_through(handles_[0], 4950, out);
    ASSERT_EQ(mapped_byte(5000), round);
  }
  EXPECT_TRUE(invalidator_runs());
  on_loop([&] { handles_[0].write_zeroes(4096, 4096); });
  EXPECT_EQ(mapped_byte(5000), 0);
}

// Faults, writes by another user and writes through a descriptor, all at once and of the same
// pages: nothing may wait for itself, and the last write is what is seen.
TEST_F(FuseMappingTest, ManyUsersOfMappedPagesDoNotBlockEachOther) {
  handles_.push_back(attach("disk"));
  ASSERT_EQ(mapper_->ask("spin"), "0");
  std::atomic<bool> done{false};
  std::thread descriptor([&] {
    const auto fd = open("disk", O_RDWR);
    const std::vector<std::byte> out(8192, std::byte{2});
    for (off_t at = 0; !done; at = (at + 8192) % static_cast<off_t>(kMapped)) {
      EXPECT_EQ(::pwrite(fd.get(), out.data(), out.size(), at), 8192);
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
  ASSERT_EQ(mapper_->ask("rest"), "0");
  const std::vector<std::byte> last(kMapped, std::byte{7});
  write_through(handles_[0], 0, last);
  for (size_t at = 0; at < kMapped; at += 1000) ASSERT_EQ(mapped_byte(at), 7) << at;
}

// Once nobody has the file open, writers need not tell the kernel any more; a new mapping starts
// with what is there then.
TEST_F(FuseMappingTest, StartsAfreshAfterTheLastClose) {
  handles_.push_back(attach("disk"));
  EXPECT_EQ(mapped_byte(0), 0);
  mapper_.reset();
  ASSERT_TRUE(
      eventually([&] { return mount_->describe()[1].find("open 0 times") != std::string::npos; }));
  write_through(handles_[0], 0, std::vector<std::byte>(100, std::byte{1}));
  map();
  EXPECT_EQ(mapped_byte(0), 1);
  write_through(handles_[0], 0, std::vector<std::byte>(100, std::byte{2}));
  EXPECT_EQ(mapped_byte(0), 2);
}

TEST_F(FuseMappingTest, IsSeenByDescriptorsAndAfterMsyncByOthers) {
  handles_.push_back(attach("disk", false));
  const auto other = open("disk", O_RDWR);
  for (int round = 1; round <= 20; ++round) {
    set_mapped_byte(5000, round);
    std::byte in{};
    ASSERT_EQ(::pread(other.get(), &in, 1, 5000), 1);
    ASSERT_EQ(static_cast<int>(in), round);
    set_mapped_byte(9000, round);
    ASSERT_EQ(mapper_->ask("sync"), "0");
    on_loop([&] { handles_[0].read(9000, base::SingleBuffer(&in, 1)); });
    ASSERT_EQ(static_cast<int>(in), round);
  }
}

}  // namespace
}  // namespace minivmm::fuse
