// SPDX-License-Identifier: Apache-2.0
// The data path: batches, joined requests, notifications, interrupts, several queues, and what
// hostile drivers do to it.
#include <array>
#include <thread>
#include <vector>

#include "base/error.h"
#include "tests/unit/virtio/block_fixture.h"
#include "virtio/queue_poller.h"

namespace minivmm::virtio {
namespace {

using Kind = TestNode::Kind;
using std::chrono::microseconds;

class BlockQueueTest : public BlockTest {};

TEST_F(BlockQueueTest, AdjacentRequestsOfABatchAreOneTransfer) {
  make();
  start();
  const auto a = pattern(4096, 1);
  const auto b = pattern(8192, 2);
  const auto c = pattern(512, 3);
  // Two streams that alternate, as two writers make them.
  const std::array<Pending, 6> all = {add_write(0, a),    add_write(1000, a), add_write(8, b),
                                      add_write(1008, b), add_write(24, c),   add_write(500, c)};
  kick();
  for (const Pending& p : all) EXPECT_EQ(wait(p), VIRTIO_BLK_S_OK);
  const auto calls = node_->calls(Kind::kWrite);
  ASSERT_EQ(calls.size(), 3U);
  EXPECT_EQ(calls[0].offset, 0U);
  EXPECT_EQ(calls[0].length, 4096U + 8192 + 512);
  EXPECT_EQ(calls[0].buffers, 3U);
  EXPECT_EQ(calls[1].offset, 512'000U);
  EXPECT_EQ(calls[1].length, 12288U);
  EXPECT_EQ(node_->content(0, 4096), a);
  EXPECT_EQ(node_->content(4096, 8192), b);
  EXPECT_EQ(node_->content(1008 * 512, 8192), b);
  // And back, each into its own buffers.
  node_->forget_calls();
  const Pending first = add_read(8, 8192);
  const Pending second = add_read(24, 512);
  kick();
  EXPECT_EQ(wait(second), VIRTIO_BLK_S_OK);
  EXPECT_EQ(wait(first), VIRTIO_BLK_S_OK);
  EXPECT_EQ(node_->calls(Kind::kRead).size(), 1U);
  EXPECT_TRUE(std::equal(b.begin(), b.end(), guest_.at(first.data, 8192)));
  EXPECT_TRUE(std::equal(c.begin(), c.end(), guest_.at(second.data, 512)));
}

TEST_F(BlockQueueTest, ReadsAndWritesAreNotJoined) {
  make();
  start();
  const Pending w = add_write(0, pattern(512, 1));
  const Pending r = add_read(1, 512);
  const Pending gap = add_read(3, 512);
  kick();
  EXPECT_EQ(wait(w), VIRTIO_BLK_S_OK);
  EXPECT_EQ(wait(r), VIRTIO_BLK_S_OK);
  EXPECT_EQ(wait(gap), VIRTIO_BLK_S_OK);
  EXPECT_EQ(node_->calls().size(), 3U);
}

// A bad sector under one request of a joined transfer must not fail its neighbours.
TEST_F(BlockQueueTest, AFailedJoinedTransferIsTriedOneByOne) {
  make();
  start();
  node_->on_call([](const TestNode::Call& call) {
    if (call.offset <= 2048 && call.offset + call.length > 2048) {
      throw base::Error(EIO, "bad sector");
    }
  });
  std::vector<Pending> all;
  for (uint64_t i = 0; i < 8; ++i) all.push_back(add_write(i * 2, pattern(1024, uint8_t(i))));
  kick();
  for (uint64_t i = 0; i < 8; ++i) {
    EXPECT_EQ(wait(all[i]), i == 2 ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK) << i;
    if (i == 2) continue;
    EXPECT_EQ(node_->content(i * 1024, 1024), pattern(1024, uint8_t(i)));
  }
  EXPECT_EQ(node_->calls().size(), 9U);
}

TEST_F(BlockQueueTest, JoinedTransfersStayBounded) {
  make();
  start();
  std::vector<Pending> all;
  const auto data = pattern(256 << 10, 1);
  for (uint64_t i = 0; i < 8; ++i) all.push_back(add_write(i * 512, data));
  kick();
  for (const Pending& p : all) EXPECT_EQ(wait(p), VIRTIO_BLK_S_OK);
  const auto calls = node_->calls(Kind::kWrite);
  EXPECT_EQ(calls.size(), 2U);
  EXPECT_EQ(calls[0].length, 1U << 20);
}

TEST_F(BlockQueueTest, ABatchIsOneInterrupt) {
  make();
  start();
  // A slow disk, so that all are in flight before the first ends; they complete in one turn of the
  // loop.
  node_->hold();
  std::vector<Pending> all;
  for (uint64_t i = 0; i < 16; ++i) all.push_back(add_read(i * 100, 512));
  queues_[0]->want_interrupt_after(15);
  kick();
  eventually([&] { return node_->waiting() == 16; }, "16 reads in flight");
  (void)take_interrupts();
  node_->release();
  EXPECT_NE(wait_interrupt() & VIRTIO_MMIO_INT_VRING, 0U);
  EXPECT_EQ(take_used(16), 16U);
  EXPECT_EQ(take_interrupts(), 0U);
}

TEST_F(BlockQueueTest, InterruptsAreSuppressedOnDemand) {
  for (const bool event_index : {true, false}) {
    if (device_) {
      stop();
      on_fiber([&] { graph_.remove("disk0"); });
    }
    make();
    start(event_index ? offered() : offered() & ~feature(VIRTIO_F_EVENT_IDX));
    queues_[0]->suppress_interrupts();
    (void)take_interrupts();
    const Pending p = add_read(0, 512);
    kick();
    eventually([&] { return queues_[0]->used_pending(); }, "the read used");
    EXPECT_EQ(status_of(p), VIRTIO_BLK_S_OK);
    ::usleep(1000);
    EXPECT_EQ(take_interrupts(), 0U);
  }
}

TEST_F(BlockQueueTest, RequestsThatWereThereBeforeTheStartAreFound) {
  make();
  start();
  // A driver may fill the ring, start the device, and rely on a notification that came too early:
  // here one that never came.
  reset();
  start();
  const Pending p = add_read(0, 512);
  (void)queues_[0]->publish();
  set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
  EXPECT_EQ(wait(p), VIRTIO_BLK_S_OK);
}

TEST_F(BlockQueueTest, QueuesRunOnTheirOwnLoops) {
  make({.num_queues = 2});
  start();
  ASSERT_EQ(queues_.size(), 2U);
  std::array<uint64_t, 2> done{};
  // One thread plays both vCPUs; the loops run in parallel.
  for (unsigned round = 0; round < 200; ++round) {
    const Pending a = add_read(round, 512, 0);
    const Pending b = add_write(4000 + round, pattern(512, uint8_t(round)), 1);
    kick(0);
    kick(1);
    done[0] += wait(a) == VIRTIO_BLK_S_OK;
    done[1] += wait(b) == VIRTIO_BLK_S_OK;
  }
  EXPECT_EQ(done[0], 200U);
  EXPECT_EQ(done[1], 200U);
  const auto lines = device_->describe();
  EXPECT_NE(lines[2].find("queue 0"), std::string::npos) << lines[2];
  EXPECT_NE(lines[3].find("queue 1"), std::string::npos) << lines[3];
  EXPECT_NE(lines[2].substr(lines[2].find("on ")), lines[3].substr(lines[3].find("on ")));
}

// More requests than the device has slots for: a driver that gives descriptors again while they are
// in flight. They wait their turn; nothing grows, nothing is lost.
TEST_F(BlockQueueTest, AtMostAQueueFullIsInFlight) {
  make({.queue_size = 4});
  start();
  node_->hold();
  const Pending p = add_read(0, 512);
  for (unsigned i = 0; i < 3; ++i) queues_[0]->push_head(p.head);
  kick();
  eventually([&] { return node_->waiting() >= 1; }, "something in flight");
  for (unsigned i = 0; i < 4; ++i) queues_[0]->push_head(p.head);
  kick();
  ::usleep(5000);
  EXPECT_LE(node_->waiting(), 4U);
  node_->release();
  EXPECT_EQ(take_used(8), 8U);
  EXPECT_EQ(status(), kDriverOk);
}

TEST_F(BlockQueueTest, ABrokenQueueNeedsResetAndTheRestGoesOn) {
  make({.num_queues = 2});
  start();
  node_->hold();
  const Pending before = add_read(0, 512);
  kick();
  eventually([&] { return node_->waiting() == 1; }, "a read in flight");
  (void)take_interrupts();
  queues_[0]->advance_available_index(1000);
  set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
  EXPECT_EQ(wait_interrupt() & VIRTIO_MMIO_INT_CONFIG, uint32_t{VIRTIO_MMIO_INT_CONFIG});
  EXPECT_EQ(status(), kDriverOk | VIRTIO_CONFIG_S_NEEDS_RESET);
  node_->release();
  EXPECT_EQ(wait(before), VIRTIO_BLK_S_OK);
  const Pending other = add_read(0, 512, 1);
  kick(1);
  EXPECT_EQ(wait(other), VIRTIO_BLK_S_OK);
  // After a reset it is as new.
  start();
  std::vector<std::byte> data(512);
  EXPECT_EQ(read(0, data), VIRTIO_BLK_S_OK);
}

TEST_F(BlockQueueTest, ARequestWithoutRoomForItsStatusBreaksTheQueue) {
  make();
  start();
  const uint64_t at = guest_.allocate(16);
  const Buffer buffers[] = {{at, 16, false}};
  queues_[0]->add(buffers);
  kick();
  eventually([&] { return status() == (kDriverOk | VIRTIO_CONFIG_S_NEEDS_RESET); }, "NEEDS_RESET");
}

TEST_F(BlockQueueTest, GoodRequestsBeforeABrokenOneAreAnswered) {
  make();
  start();
  const Pending good = add_read(0, 512);
  queues_[0]->push_head(0xffff);
  kick();
  EXPECT_EQ(wait(good), VIRTIO_BLK_S_OK);
  eventually([&] { return status() == (kDriverOk | VIRTIO_CONFIG_S_NEEDS_RESET); }, "NEEDS_RESET");
}

TEST_F(BlockQueueTest, AQueueThatCannotBeNeedsReset) {
  make();
  start();
  reset();
  set(VIRTIO_MMIO_STATUS, 1);
  set(VIRTIO_MMIO_STATUS, 3);
  set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
  set(VIRTIO_MMIO_DRIVER_FEATURES, 1);
  set(VIRTIO_MMIO_STATUS, 11);
  set(VIRTIO_MMIO_QUEUE_SEL, 0);
  set(VIRTIO_MMIO_QUEUE_NUM, 512);  // more than offered
  const uint64_t at = guest_.allocate(65536, 4096);
  set(VIRTIO_MMIO_QUEUE_DESC_LOW, static_cast<uint32_t>(at));
  set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, static_cast<uint32_t>(at + 16384));
  set(VIRTIO_MMIO_QUEUE_USED_LOW, static_cast<uint32_t>(at + 32768));
  set(VIRTIO_MMIO_QUEUE_READY, 1);
  set(VIRTIO_MMIO_STATUS, 15);
  EXPECT_EQ(status(), kDriverOk | VIRTIO_CONFIG_S_NEEDS_RESET);
}

TEST_F(BlockQueueTest, SmallerQueuesThanOfferedWork) {
  make();
  for (const uint16_t size : {uint16_t{2}, uint16_t{4}, uint16_t{128}}) {
    start(offered(), size);
    const auto data = pattern(2048, uint8_t(size));
    const uint64_t at = guest_.allocate(2048);
    std::copy(data.begin(), data.end(), guest_.at(at, 2048));
    const Buffer buffers[] = {{at, 1024, false}, {at + 1024, 1024, false}};
    // An indirect table may be longer than a small queue.
    const Pending p = add(VIRTIO_BLK_T_OUT, 0, buffers, 0, true);
    kick();
    EXPECT_EQ(wait(p), VIRTIO_BLK_S_OK);
    EXPECT_EQ(node_->content(0, 2048), data);
  }
}

TEST(QueuePoller, LooksOnlyWhileThatPays) {
  QueuePoller poller(microseconds(32));
  EXPECT_EQ(poller.window(), microseconds(0));
  for (int i = 0; i < 10; ++i) poller.slept(microseconds(20));
  EXPECT_EQ(poller.window(), microseconds(32));
  for (int i = 0; i < 10; ++i) poller.slept(microseconds(500));
  EXPECT_EQ(poller.window(), microseconds(0));
  // A look that takes long is one in which somebody else had the processor: stay away for a while.
  for (int i = 0; i < 10; ++i) poller.slept(microseconds(20));
  poller.looked(microseconds(1));
  EXPECT_EQ(poller.window(), microseconds(32));
  poller.looked(microseconds(3000));
  EXPECT_EQ(poller.window(), microseconds(0));
  for (int i = 0; i < 60; ++i) poller.slept(microseconds(20));
  EXPECT_EQ(poller.window(), microseconds(0));
  for (int i = 0; i < 20; ++i) poller.slept(microseconds(20));
  EXPECT_EQ(poller.window(), microseconds(32));
  QueuePoller off(microseconds(0));
  off.slept(microseconds(0));
  EXPECT_EQ(off.window(), microseconds(0));
}

}  // namespace
}  // namespace minivmm::virtio
