// SPDX-License-Identifier: Apache-2.0
// Many requests at once.
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <random>
#include <thread>

#include <gtest/gtest.h>
#include <liburing.h>

#include "fuse_fixture.h"

namespace minivmm::fuse {
namespace {

class FuseLoadTest : public FuseTest {
 protected:
  static constexpr size_t kBlock = 4096;
};

// Without parallel direct writes the kernel sends one write of a file at a time.
TEST_F(FuseLoadTest, WritesOfOneFileAreInFlightTogether) {
  const auto node = add_gated("disk");
  start();
  const auto fd = open("disk", O_RDWR | O_DIRECT);
  constexpr int kWriters = 16;
  node->hold();
  std::vector<std::thread> writers;
  std::atomic<int> failed{0};
  for (int i = 0; i < kWriters; ++i) {
    writers.emplace_back([&, i] {
      AlignedBytes bytes(kBlock, i);
      if (::pwrite(fd.get(), bytes.data(), kBlock, i * static_cast<off_t>(kBlock)) != kBlock) {
        ++failed;
      }
    });
  }
  EXPECT_TRUE(eventually([&] { return node->waiting() == kWriters; }))
      << "only " << node->waiting() << " writes reached the node";
  node->let_go();
  for (std::thread& writer : writers) writer.join();
  EXPECT_EQ(failed, 0);
}

// What is held back at the node is bounded; what waits behind it gets its turn.
TEST_F(FuseLoadTest, MoreRequestsThanAreAdmittedAllEnd) {
  const auto node = add_gated("disk");
  start();
  const auto fd = open("disk", O_RDONLY | O_DIRECT);
  constexpr int kReaders = 400;
  node->hold();
  std::vector<std::thread> readers;
  std::atomic<int> done{0};
  for (int i = 0; i < kReaders; ++i) {
    readers.emplace_back([&, i] {
      AlignedBytes bytes(kBlock);
      if (::pread(fd.get(), bytes.data(), kBlock, i % 100 * static_cast<off_t>(kBlock)) == kBlock) {
        ++done;
      }
    });
  }
  EXPECT_TRUE(eventually([&] { return node->waiting() >= 128; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_LE(node->most_waiting(), 256) << "two loops admit 128 each";
  EXPECT_EQ(done, 0);
  node->let_go();
  for (std::thread& reader : readers) reader.join();
  EXPECT_EQ(done, kReaders);
}

// Large writes are bounded by their bytes.
TEST_F(FuseLoadTest, BytesInFlightAreBounded) {
  constexpr size_t kLarge = size_t{1} << 20;
  const auto node = add_gated("disk", 2 * kLarge);
  start();
  const auto fd = open("disk", O_RDWR | O_DIRECT);
  node->hold();
  std::vector<std::thread> writers;
  std::atomic<int> done{0};
  AlignedBytes bytes(kLarge, 1);
  for (int i = 0; i < 100; ++i) {
    writers.emplace_back([&] {
      if (::pwrite(fd.get(), bytes.data(), kLarge, 0) == kLarge) ++done;
    });
  }
  EXPECT_TRUE(eventually([&] { return node->waiting() >= 32; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_LE(node->most_waiting(), 64) << "two loops admit 32 MiB each";
  node->let_go();
  for (std::thread& writer : writers) writer.join();
  EXPECT_EQ(done, 100);
}

// A range that is punched or zeroed is as large as one likes and costs no memory: it must not count
// against what is admitted.
TEST_F(FuseLoadTest, LongFallocatesDoNotHoldOthersBack) {
  constexpr uint64_t kLarge = uint64_t{40} << 20;
  std::vector<std::thread> callers;
  std::vector<base::UniqueFd> files;
  std::vector<std::shared_ptr<GatedNode>> nodes;
  for (const char* const name : {"a", "b", "c"}) nodes.push_back(add_gated(name, kLarge));
  start();
  // More than there are channels to read requests from.
  for (const char* const name : {"a", "b", "c"}) files.push_back(open(name, O_RDWR));
  for (const auto& node : nodes) node->hold();
  std::atomic<int> failed{0};
  for (const base::UniqueFd& fd : files) {
    callers.emplace_back([&failed, raw = fd.get()] {
      if (::fallocate(raw, FALLOC_FL_ZERO_RANGE, 0, kLarge) != 0) ++failed;
    });
  }
  EXPECT_TRUE(eventually([&] { return nodes[0]->waiting() + nodes[1]->waiting() >= 2; }));
  std::atomic<bool> answered{false};
  std::thread looker([&] {
    struct stat info {};
    answered = ::stat(file("a").c_str(), &info) == 0;
  });
  EXPECT_TRUE(eventually([&] { return answered.load(); })) << "nobody reads requests any more";
  for (const auto& node : nodes) node->let_go();
  looker.join();
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(failed, 0);
}

// Threads on regions of their own, each against a model: lengths and places of every kind.
TEST_F(FuseLoadTest, ThreadsReadWhatTheyWrote) {
  constexpr size_t kRegion = size_t{1} << 20;
  constexpr int kThreads = 8;
  add("disk", "driver=memory,size=8M");
  start();
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(seed + static_cast<uint64_t>(t));
      const auto fd = open("disk", O_RDWR);
      std::vector<std::byte> model(kRegion);
      std::vector<std::byte> in(kRegion);
      const auto base = static_cast<off_t>(t * kRegion);
      for (int i = 0; i < 400; ++i) {
        const size_t length = 1 + random() % (i % 10 == 0 ? 300'000 : 9'000);
        const size_t at = random() % (kRegion - length);
        const auto offset = base + static_cast<off_t>(at);
        if (random() % 2 == 0) {
          const auto out = random_bytes(length, random());
          std::memcpy(model.data() + at, out.data(), length);
          if (::pwrite(fd.get(), out.data(), length, offset) != static_cast<ssize_t>(length)) {
            ++wrong;
          }
        } else if (::pread(fd.get(), in.data(), length, offset) != static_cast<ssize_t>(length) ||
                   std::memcmp(in.data(), model.data() + at, length) != 0) {
          ++wrong;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// One ring with 32 requests in flight; a block has one request at a time, so that the model is
// exact.
TEST_F(FuseLoadTest, RingOfThirtyTwoAgreesWithAModel) {
  constexpr unsigned kDepth = 32;
  constexpr size_t kBlocks = 512;
  constexpr int kRequests = 8000;
  const std::string image = dir_.path("image");
  ASSERT_EQ(run({"truncate", "-s", "2M", image}), 0);
  add("disk", "driver=file,filename=" + image);
  start();
  const auto fd = open("disk", O_RDWR | O_DIRECT);
  io_uring ring{};
  if (const int error = ::io_uring_queue_init(kDepth, &ring, 0); error < 0) {
    GTEST_SKIP() << "io_uring is refused: " << std::strerror(-error);
  }
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  std::vector<uint64_t> model(kBlocks, 0);  // the number that each block is filled with
  struct Slot {
    std::unique_ptr<AlignedBytes> bytes = std::make_unique<AlignedBytes>(kBlock);
    size_t block = 0;
    uint64_t expected = 0;
    bool writes = false;
  };
  std::vector<Slot> slots(kDepth);
  std::vector<bool> busy(kBlocks, false);
  const auto begin = [&](Slot& slot) {
    do {
      slot.block = random() % kBlocks;
    } while (busy[slot.block]);
    busy[slot.block] = true;
    slot.writes = random() % 2 == 0;
    auto* const words = reinterpret_cast<uint64_t*>(slot.bytes->data());
    if (slot.writes) model[slot.block] = random();
    slot.expected = model[slot.block];
    for (size_t i = 0; i < kBlock / 8; ++i) words[i] = slot.writes ? slot.expected : ~uint64_t{0};
    io_uring_sqe* const sqe = ::io_uring_get_sqe(&ring);
    if (slot.writes) {
      ::io_uring_prep_write(sqe, fd.get(), slot.bytes->data(), kBlock, slot.block * kBlock);
    } else {
      ::io_uring_prep_read(sqe, fd.get(), slot.bytes->data(), kBlock, slot.block * kBlock);
    }
    ::io_uring_sqe_set_data(sqe, &slot);
  };
  int started = 0;
  for (Slot& slot : slots) begin(slot), ++started;
  for (int ended = 0; ended < kRequests; ++ended) {
    ASSERT_GE(::io_uring_submit_and_wait(&ring, 1), 0);
    io_uring_cqe* cqe = nullptr;
    ASSERT_EQ(::io_uring_wait_cqe(&ring, &cqe), 0);
    Slot& slot = *static_cast<Slot*>(::io_uring_cqe_get_data(cqe));
    ASSERT_EQ(cqe->res, static_cast<int>(kBlock));
    ::io_uring_cqe_seen(&ring, cqe);
    const auto* const words = reinterpret_cast<const uint64_t*>(slot.bytes->data());
    for (size_t i = 0; i < kBlock / 8; ++i) {
      ASSERT_EQ(words[i], slot.expected) << "block " << slot.block << " word " << i;
    }
    busy[slot.block] = false;
    if (started < kRequests) begin(slot), ++started;
  }
  ::io_uring_queue_exit(&ring);
}

// Where io_uring is refused the loops wait with epoll.
TEST(FuseWithoutIoUring, ServesManyThreads) {
  MINIVMM_SKIP_WITHOUT_FUSE();
  const TempDir dir;
  base::LoopGroup loops(2, base::BackendChoice::kEpoll);
  block::Graph graph;
  Mount mount(loops, dir.path("mnt"));
  loops.loop(0).call("test", [&] {
    graph.add(block::Options::from_text("driver=memory,node-name=disk,size=4M"));
    mount.add_file("disk", graph.attach("disk", "FUSE", block::Permissions::front_end(true)),
                   {.writable = true});
    mount.start();
  });
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      const base::UniqueFd fd(::open(dir.path("mnt/disk").c_str(), O_RDWR | O_CLOEXEC));
      std::vector<std::byte> in(5000);
      for (int i = 0; i < 200; ++i) {
        const std::vector<std::byte> out(5000, static_cast<std::byte>(t + i));
        const off_t at = t * 400'000 + i * 997;
        if (::pwrite(fd.get(), out.data(), out.size(), at) != 5000) ++wrong;
        if (::pread(fd.get(), in.data(), in.size(), at) != 5000 || in != out) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  loops.loop(0).call("test", [&] {
    EXPECT_TRUE(mount.stop(std::chrono::seconds(10)).empty());
    graph.close();
  });
}

}  // namespace
}  // namespace minivmm::fuse
