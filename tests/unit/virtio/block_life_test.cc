// SPDX-License-Identifier: Apache-2.0
// Start, reset and end, with requests in flight and disks that are slow or hang.
#include <array>
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "base/error.h"
#include "tests/unit/virtio/block_fixture.h"

namespace minivmm::virtio {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

class BlockLifeTest : public BlockTest {};

TEST_F(BlockLifeTest, ResetWaitsForRequestsInFlight) {
  make();
  start();
  node_->hold();
  const Pending p = add_read(0, 4096);
  kick();
  eventually([&] { return node_->waiting() == 1; }, "a read in flight");
  std::atomic<bool> done{false};
  std::thread vcpu([&] {
    reset();
    done = true;
  });
  ::usleep(20'000);
  EXPECT_FALSE(done);
  EXPECT_NE(status(), 0U);
  node_->release();
  vcpu.join();
  EXPECT_EQ(status(), 0U);
  // The memory is the guest's again: nothing may write to it from now on.
  const auto region = guest_.bytes(TestGuest::kBase, 1 << 20);
  std::fill(region.begin(), region.end(), std::byte{0x55});
  ::usleep(5'000);
  EXPECT_TRUE(
      std::all_of(region.begin(), region.end(), [](std::byte b) { return b == std::byte{0x55}; }));
  (void)p;
}

TEST_F(BlockLifeTest, ManyResetsUnderLoad) {
  make({.num_queues = 2});
  const uint32_t seed = std::random_device{}();
  RecordProperty("seed", static_cast<int>(seed));
  Random random(seed);
  for (unsigned round = 0; round < 60; ++round) {
    SCOPED_TRACE(testing::Message() << "seed " << seed << ", round " << round);
    start();
    const unsigned count = random() % 32;
    for (unsigned i = 0; i < count; ++i) {
      const auto queue = static_cast<uint16_t>(random() % 2);
      if (random() % 2 != 0) {
        add_write(random() % 4000, pattern(512, uint8_t(i)), queue);
      } else {
        add_read(random() % 4000, 512, queue);
      }
    }
    kick(0);
    kick(1);
    ::usleep(random() % 200);
    reset();
    ASSERT_EQ(status(), 0U);
    ASSERT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
    // After the reset the used rings stand still.
    const uint16_t used[] = {queues_[0]->used_index(), queues_[1]->used_index()};
    ::usleep(random() % 100);
    ASSERT_EQ(queues_[0]->used_index(), used[0]);
    ASSERT_EQ(queues_[1]->used_index(), used[1]);
  }
  start();
  std::vector<std::byte> data(512);
  EXPECT_EQ(read(0, data), VIRTIO_BLK_S_OK);
}

TEST_F(BlockLifeTest, OneQueueCanBeStoppedAlone) {
  make({.num_queues = 2});
  start();
  set(VIRTIO_MMIO_QUEUE_SEL, 0);
  set(VIRTIO_MMIO_QUEUE_READY, 0);
  EXPECT_EQ(get(VIRTIO_MMIO_QUEUE_READY), 0U);
  const Pending stopped = add_read(0, 512, 0);
  kick(0);
  set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
  const Pending other = add_read(0, 512, 1);
  kick(1);
  EXPECT_EQ(wait(other), VIRTIO_BLK_S_OK);
  EXPECT_EQ(status_of(stopped), kUnanswered);
  reset();
  start();
  std::vector<std::byte> data(512);
  EXPECT_EQ(read(0, data), VIRTIO_BLK_S_OK);
}

TEST_F(BlockLifeTest, StopWaitsFlushesAndCloses) {
  make();
  start();
  const Pending p = add_write(0, pattern(4096, 1));
  kick();
  EXPECT_EQ(wait(p), VIRTIO_BLK_S_OK);
  node_->forget_calls();
  const StopReport report = device_->stop(std::chrono::seconds(5));
  EXPECT_TRUE(report.idle);
  EXPECT_EQ(report.error, "");
  EXPECT_EQ(node_->calls(TestNode::Kind::kFlush).size(), 1U);
  EXPECT_TRUE(node_->users().empty());
  // A guest that goes on finds a device that does nothing, and does not crash us.
  kick();
  set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
  device_->resize();
  EXPECT_EQ(config<uint64_t>(0), kDiskBytes / 512);
  reset();
  set(VIRTIO_MMIO_STATUS, 1);
  (void)device_->describe();
  device_.reset();
}

TEST_F(BlockLifeTest, AFlushThatFailsAtTheEndIsReported) {
  make();
  start();
  ASSERT_EQ(write(0, pattern(512, 1)), VIRTIO_BLK_S_OK);
  node_->on_call([](const TestNode::Call&) { throw base::Error(EIO, "the disk is gone"); });
  const StopReport report = device_->stop(std::chrono::seconds(5));
  EXPECT_TRUE(report.idle);
  EXPECT_NE(report.error.find("the disk is gone"), std::string::npos) << report.error;
  device_.reset();
}

// SIGTERM with a disk that hangs: stop() comes back at its deadline and says what hangs, and a vCPU
// that waits for a reset comes back too.
TEST_F(BlockLifeTest, StopEndsAtItsDeadlineWithAHungDisk) {
  make();
  start();
  node_->hold();
  add_read(8, 4096);
  kick();
  eventually([&] { return node_->waiting() == 1; }, "a read in flight");
  std::thread vcpu([&] { reset(); });
  const auto before = steady_clock::now();
  const StopReport report = device_->stop(milliseconds(50));
  EXPECT_LT(steady_clock::now() - before, std::chrono::seconds(2));
  vcpu.join();
  EXPECT_NE(status(), 0U);  // not reset: its memory is still in use
  EXPECT_FALSE(report.idle);
  ASSERT_EQ(report.in_flight.size(), 1U);
  EXPECT_NE(report.in_flight[0].find("read of 4096 bytes at sector 8"), std::string::npos)
      << report.in_flight[0];
  device_.reset();  // leaves what is in flight alive
  node_->release();
  // Should the disk come back after all, it is let go of.
  eventually([&] { return node_->users().empty(); }, "the handle closed");
}

// The requests have ended, but the flush that lets go of the disk hangs.
TEST_F(BlockLifeTest, StopEndsAtItsDeadlineWithAHungFlush) {
  make();
  start();
  ASSERT_EQ(write(0, pattern(512, 1)), VIRTIO_BLK_S_OK);
  node_->hold();
  const auto before = steady_clock::now();
  const StopReport report = device_->stop(milliseconds(50));
  EXPECT_LT(steady_clock::now() - before, std::chrono::seconds(2));
  EXPECT_FALSE(report.idle);
  EXPECT_EQ(report.error, "");
  ASSERT_EQ(report.in_flight.size(), 1U);
  EXPECT_NE(report.in_flight[0].find("flush"), std::string::npos) << report.in_flight[0];
  EXPECT_EQ(node_->waiting(), 1U);
  // Nothing is in flight in the guest's memory, so a reset need not wait for the disk.
  reset();
  EXPECT_EQ(status(), 0U);
  set(VIRTIO_MMIO_STATUS, 1);
  (void)device_->describe();
  device_.reset();  // leaves the flush its device
  EXPECT_FALSE(node_->users().empty());
  node_->release();
  eventually([&] { return node_->users().empty(); }, "the handle closed");
  EXPECT_EQ(node_->calls(TestNode::Kind::kFlush).size(), 1U);
}

TEST_F(BlockLifeTest, StopWorksOnAFiberOfTheDevicesLoop) {
  make();
  start();
  add_read(0, 4096);
  kick();
  const StopReport report = on_fiber([&] { return device_->stop(std::chrono::seconds(5)); });
  EXPECT_TRUE(report.idle);
  device_.reset();
}

TEST_F(BlockLifeTest, ADeviceThatWasNeverStartedStops) {
  make();
  EXPECT_TRUE(device_->stop(std::chrono::seconds(5)).idle);
  device_.reset();
}

TEST_F(BlockLifeTest, VcpusMayDoAnythingAtOnce) {
  make({.num_queues = 2});
  start();
  std::atomic<bool> go{true};
  std::vector<std::thread> vcpus;
  for (uint32_t n = 0; n < 3; ++n) {
    vcpus.emplace_back([&, n] {
      Random random(n);
      std::array<std::byte, 4> data{};
      while (go) {
        const uint64_t offset = random() % 0x140 & ~uint64_t{3};
        for (std::byte& b : data) b = static_cast<std::byte>(random() % 16);
        if (random() % 2 != 0) {
          device_->read(offset, data);
        } else {
          device_->write(offset, data);
        }
      }
    });
  }
  for (unsigned i = 0; i < 50; ++i) {
    device_->resize();
    (void)device_->describe();
    ::usleep(2000);
  }
  go = false;
  for (std::thread& t : vcpus) t.join();
  start();
  std::vector<std::byte> data(512);
  EXPECT_EQ(read(0, data), VIRTIO_BLK_S_OK);
}

// Where io_uring is refused: notifications are waited for, and the wait is cancelled, in another
// way.
class EpollBlockTest : public BlockTest {
 protected:
  EpollBlockTest() : BlockTest(base::BackendChoice::kEpoll) {}
};

TEST_F(EpollBlockTest, RunsResetsAndStops) {
  make({.num_queues = 2});
  for (unsigned round = 0; round < 20; ++round) {
    start();
    for (uint16_t q = 0; q < 2; ++q) {
      const Pending p = add_write(round, pattern(512, uint8_t(round)), q);
      kick(q);
      ASSERT_EQ(wait(p), VIRTIO_BLK_S_OK);
    }
    ::usleep(200);  // asleep, so that the next kick or the reset must wake it
    if (round % 2 == 0) continue;
    reset();
    ASSERT_EQ(status(), 0U);
  }
}

// Random requests of all kinds, in batches on two queues, against an array of bytes. Ranges of one
// batch do not overlap, so that each has one right answer.
TEST_F(BlockLifeTest, RandomRequestsMatchAByteArray) {
  const uint32_t seed = std::random_device{}();
  RecordProperty("seed", static_cast<int>(seed));
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  Random random(seed);
  make({.num_queues = 2, .queue_size = 64});
  std::vector<std::byte> model(kDiskBytes);
  constexpr uint64_t kSectors = kDiskBytes / 512;
  for (unsigned round = 0; round < 24; ++round) {
    start(random() % 2 != 0 ? offered() : offered() & ~feature(VIRTIO_F_EVENT_IDX));
    for (unsigned batch = 0; batch < 6; ++batch) {
      struct Check {
        Pending request;
        uint64_t sector;
        bool reads;
      };
      std::vector<Check> checks;
      uint64_t sector = random() % 64;
      const unsigned count = 1 + random() % 12;
      for (unsigned i = 0; i < count && sector + 16 < kSectors; ++i) {
        const uint64_t sectors = 1 + random() % 12;
        const auto bytes = static_cast<uint32_t>(sectors * 512);
        const auto queue = static_cast<uint16_t>(random() % 2);
        const auto at = model.begin() + static_cast<ptrdiff_t>(sector * 512);
        switch (random() % 4) {
          case 0:
            checks.push_back({add_read(sector, bytes, queue), sector, true});
            break;
          case 1: {
            const uint64_t range = guest_.allocate(16);
            guest_.store<uint64_t>(range, sector);
            guest_.store<uint32_t>(range + 8, static_cast<uint32_t>(sectors));
            guest_.store<uint32_t>(range + 12, random() % 2);
            const Buffer buffer[] = {{range, 16, false}};
            checks.push_back({add(VIRTIO_BLK_T_WRITE_ZEROES, 0, buffer, queue), sector, false});
            std::fill(at, at + bytes, std::byte{0});
            break;
          }
          default: {
            const auto data = pattern(bytes, uint8_t(random()));
            checks.push_back({add_write(sector, data, queue), sector, false});
            std::copy(data.begin(), data.end(), at);
            break;
          }
        }
        sector += sectors + (random() % 3 == 0 ? random() % 600 : 0);
      }
      kick(0);
      kick(1);
      for (const Check& check : checks) {
        ASSERT_EQ(wait(check.request), VIRTIO_BLK_S_OK);
        if (!check.reads) continue;
        const auto got = guest_.bytes(check.request.data, check.request.bytes);
        ASSERT_TRUE(std::equal(got.begin(), got.end(),
                               model.begin() + static_cast<ptrdiff_t>(check.sector * 512)))
            << "sector " << check.sector;
      }
    }
  }
  EXPECT_EQ(node_->content(0, kDiskBytes), model);
}

}  // namespace
}  // namespace minivmm::virtio
