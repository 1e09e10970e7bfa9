// SPDX-License-Identifier: Apache-2.0
#include "virtio/queue.h"

#include <string>

#include <functional>
#include <vector>

#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/unit/virtio/guest.h"

namespace minivmm::virtio {
namespace {

constexpr uint16_t kSize = 8;
constexpr QueueFeatures kAll{.indirect = true, .event_index = true};

class QueueTest : public testing::Test {
 protected:
  Queue device(QueueFeatures features = kAll, uint32_t max_segments = kSize) {
    return Queue(guest_.memory(), driver_.layout(), features, max_segments);
  }

  TestGuest guest_;
  DriverQueue driver_{guest_, kSize, true};
  std::vector<iovec> segments_{kSize};
  Chain chain_;
};

TEST_F(QueueTest, AnEmptyRingGivesNothing) {
  Queue queue = device();
  EXPECT_FALSE(queue.has_available());
  EXPECT_EQ(queue.pop(segments_, chain_), Queue::Pop::kEmpty);
}

TEST_F(QueueTest, AChainArrivesInOrderWithItsDirections) {
  Queue queue = device();
  const uint64_t a = guest_.allocate(16);
  const uint64_t b = guest_.allocate(512);
  const uint64_t c = TestGuest::kHighBase;
  const Buffer buffers[] = {{a, 16, false}, {b, 512, true}, {c, 1, true}};
  const uint16_t head = driver_.add(buffers);
  // Not visible before the index moves: a device that reads ahead would see half-written chains.
  EXPECT_FALSE(queue.has_available());
  driver_.publish();
  ASSERT_EQ(queue.pop(segments_, chain_), Queue::Pop::kChain);
  EXPECT_EQ(chain_.head, head);
  EXPECT_EQ(chain_.readable, 1U);
  EXPECT_EQ(chain_.writable, 2U);
  EXPECT_EQ(segments_[0].iov_base, guest_.at(a));
  EXPECT_EQ(segments_[1].iov_base, guest_.at(b));
  EXPECT_EQ(segments_[1].iov_len, 512U);
  EXPECT_EQ(segments_[2].iov_base, guest_.at(c));
  EXPECT_EQ(queue.pop(segments_, chain_), Queue::Pop::kEmpty);
}

TEST_F(QueueTest, IndirectChainsMayFollowDirectDescriptors) {
  Queue queue = device();
  const uint64_t data = guest_.allocate(64);
  const uint64_t table = guest_.allocate(32);
  driver_.write_descriptor(table, 0, data + 16, 16, VIRTQ_DESC_F_NEXT, 1);
  driver_.write_descriptor(table, 1, data + 32, 16, VIRTQ_DESC_F_WRITE, 0);
  driver_.write_descriptor(driver_.layout().descriptors, 0, data, 16, VIRTQ_DESC_F_NEXT, 5);
  // The write flag of the descriptor that refers to the table means nothing.
  driver_.write_descriptor(driver_.layout().descriptors, 5, table, 32,
                           VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_WRITE, 0);
  driver_.push_head(0);
  driver_.publish();
  ASSERT_EQ(queue.pop(segments_, chain_), Queue::Pop::kChain);
  EXPECT_EQ(chain_.readable, 2U);
  EXPECT_EQ(chain_.writable, 1U);
  EXPECT_EQ(segments_[2].iov_base, guest_.at(data + 32));
}

TEST_F(QueueTest, SegmentsWithoutBytesAreLeftOut) {
  Queue queue = device();
  const uint64_t a = guest_.allocate(16);
  // An address that would be refused, were there anything at it.
  const Buffer buffers[] = {{0, 0, false}, {a, 16, false}, {0, 0, true}, {a, 1, true}};
  driver_.add(buffers);
  driver_.publish();
  ASSERT_EQ(queue.pop(segments_, chain_), Queue::Pop::kChain);
  EXPECT_EQ(chain_.readable, 1U);
  EXPECT_EQ(chain_.writable, 1U);
}

TEST_F(QueueTest, UsedEntriesAreSeenOnlyWhenPublished) {
  Queue queue = device();
  queue.push_used(3, 100);
  queue.push_used(5, 200);
  EXPECT_TRUE(queue.unpublished());
  EXPECT_EQ(driver_.used_index(), 0);
  queue.publish();
  EXPECT_FALSE(queue.unpublished());
  EXPECT_EQ(driver_.used_index(), 2);
  auto used = driver_.take_used();
  ASSERT_TRUE(used);
  EXPECT_EQ(used->id, 3U);
  EXPECT_EQ(used->length, 100U);
  used = driver_.take_used();
  EXPECT_EQ(used->id, 5U);
  EXPECT_EQ(used->length, 200U);
}

// 2^16 requests and more, one to eight at a time: positions in both rings, and both event indices,
// wrap. A mistake loses a notification, an interrupt or a request.
TEST_F(QueueTest, IndicesWrapWithEventIndices) {
  Queue queue = device();
  const uint64_t data = guest_.allocate(16);
  const Buffer buffer[] = {{data, 16, true}};
  unsigned batch = 1;
  for (unsigned done = 0; done < 150'000; done += batch) {
    batch = batch % kSize + 1;
    ASSERT_TRUE(queue.enable_notifications());
    driver_.want_interrupt_after(static_cast<uint16_t>(batch - 1));
    for (unsigned i = 0; i < batch; ++i) driver_.add(buffer);
    ASSERT_TRUE(driver_.publish()) << "no notification after " << done;
    queue.disable_notifications();
    for (unsigned i = 0; i < batch; ++i) {
      ASSERT_EQ(queue.pop(segments_, chain_), Queue::Pop::kChain) << "after " << done;
      queue.push_used(chain_.head, 1);
      // One at a time here: only the last one reaches the event.
      ASSERT_EQ(queue.publish(), i + 1 == batch) << "after " << done << ", " << i;
      ASSERT_TRUE(driver_.take_used());
    }
    ASSERT_EQ(queue.pop(segments_, chain_), Queue::Pop::kEmpty);
  }
}

TEST_F(QueueTest, WithoutEventIndicesTheFlagsDecide) {
  DriverQueue driver(guest_, kSize, false);
  Queue queue(guest_.memory(), driver.layout(), {}, kSize);
  const Buffer buffer[] = {{guest_.allocate(16), 16, true}};
  queue.disable_notifications();
  driver.add(buffer);
  EXPECT_FALSE(driver.publish());
  // Enabling must say that one slipped in before: its notification was suppressed.
  EXPECT_FALSE(queue.enable_notifications());
  ASSERT_EQ(queue.pop(segments_, chain_), Queue::Pop::kChain);
  EXPECT_TRUE(queue.enable_notifications());
  driver.add(buffer);
  EXPECT_TRUE(driver.publish());
  queue.push_used(0, 0);
  EXPECT_TRUE(queue.publish());
  driver.suppress_interrupts();
  queue.push_used(0, 0);
  EXPECT_FALSE(queue.publish());
}

TEST_F(QueueTest, EnablingNotificationsReportsWhatSlippedIn) {
  Queue queue = device();
  const Buffer buffer[] = {{guest_.allocate(16), 16, true}};
  ASSERT_TRUE(queue.enable_notifications());
  driver_.add(buffer);
  EXPECT_TRUE(driver_.publish());
  ASSERT_EQ(queue.pop(segments_, chain_), Queue::Pop::kChain);
  driver_.add(buffer);
  // The index that was asked for has been passed already, so nothing notifies us of this one.
  EXPECT_FALSE(driver_.publish());
  EXPECT_FALSE(queue.enable_notifications());
}

TEST_F(QueueTest, DisabledNotificationsStayAwayForManyRequests) {
  Queue queue = device();
  const Buffer buffer[] = {{guest_.allocate(16), 16, true}};
  ASSERT_TRUE(queue.enable_notifications());
  queue.disable_notifications();
  for (unsigned i = 0; i < kSize; ++i) {
    driver_.add(buffer);
    EXPECT_FALSE(driver_.publish());
  }
}

TEST(IndexPassed, IsTheSameWhereverTheIndicesStand) {
  for (uint32_t base = 0; base < 0x10000; base += 37) {
    const auto at = [&](int n) { return static_cast<uint16_t>(base + static_cast<uint32_t>(n)); };
    EXPECT_TRUE(index_passed(at(0), at(1), at(0)));
    EXPECT_TRUE(index_passed(at(3), at(5), at(0)));
    EXPECT_FALSE(index_passed(at(5), at(5), at(0)));
    EXPECT_FALSE(index_passed(at(-1), at(5), at(0)));
    EXPECT_FALSE(index_passed(at(0), at(0), at(0)));
  }
}

// --- Hostile drivers ---

struct Hostile {
  const char* name;
  QueueFault fault;
  std::function<void(TestGuest&, DriverQueue&)> act;
};

void one_descriptor(DriverQueue& driver, uint64_t address, uint32_t length, uint16_t flags,
                    uint16_t next = 0) {
  driver.write_descriptor(driver.layout().descriptors, 0, address, length, flags, next);
  driver.push_head(0);
  driver.publish();
}

const std::vector<Hostile>& hostile_drivers() {
  static const uint64_t kTable = TestGuest::kHighBase;
  static const std::vector<Hostile> all = {
      {"IndexJump", QueueFault::kIndexJump,
       [](TestGuest&, DriverQueue& d) { d.set_available_index(kSize + 1); }},
      {"IndexBackwards", QueueFault::kIndexJump,
       [](TestGuest&, DriverQueue& d) { d.set_available_index(0xffff); }},
      {"HeadOutOfRange", QueueFault::kHeadOutOfRange,
       [](TestGuest&, DriverQueue& d) {
         d.push_head(kSize);
         d.publish();
       }},
      {"HeadFarOutOfRange", QueueFault::kHeadOutOfRange,
       [](TestGuest&, DriverQueue& d) {
         d.push_head(0xffff);
         d.publish();
       }},
      {"NextOutOfRange", QueueFault::kNextOutOfRange,
       [](TestGuest&, DriverQueue& d) {
         one_descriptor(d, TestGuest::kBase, 1, VIRTQ_DESC_F_NEXT, kSize);
       }},
      {"LoopOnItself", QueueFault::kLoop,
       [](TestGuest&, DriverQueue& d) { one_descriptor(d, 0, 0, VIRTQ_DESC_F_NEXT, 0); }},
      {"LoopWithBytes", QueueFault::kLoop,
       [](TestGuest&, DriverQueue& d) {
         one_descriptor(d, TestGuest::kBase, 1, VIRTQ_DESC_F_NEXT, 0);
       }},
      {"MoreSegmentsThanTheQueue", QueueFault::kTooManySegments,
       [](TestGuest&, DriverQueue& d) {
         for (uint16_t i = 0; i < kSize; ++i) {
           d.write_descriptor(kTable, i, kTable, 1, VIRTQ_DESC_F_NEXT, uint16_t(i + 1));
         }
         d.write_descriptor(d.layout().descriptors, 1, kTable, kSize * 16, VIRTQ_DESC_F_INDIRECT,
                            0);
         one_descriptor(d, kTable, 1, VIRTQ_DESC_F_NEXT, 1);
       }},
      {"BufferOutside", QueueFault::kBadAddress,
       [](TestGuest&, DriverQueue& d) { one_descriptor(d, 0x10, 16, 0); }},
      {"BufferPastTheEnd", QueueFault::kBadAddress,
       [](TestGuest&, DriverQueue& d) {
         one_descriptor(d, TestGuest::kBase + TestGuest::kSize - 1, 2, 0);
       }},
      {"BufferWraps", QueueFault::kBadAddress,
       [](TestGuest&, DriverQueue& d) { one_descriptor(d, ~uint64_t{0}, 2, 0); }},
      {"BufferOfFourGiB", QueueFault::kBadAddress,
       [](TestGuest&, DriverQueue& d) { one_descriptor(d, TestGuest::kBase, 0xffffffff, 0); }},
      {"ReadableAfterWritable", QueueFault::kReadableAfterWritable,
       [](TestGuest&, DriverQueue& d) {
         const Buffer b[] = {{TestGuest::kBase, 1, true}, {TestGuest::kBase, 1, false}};
         d.add(b);
         d.publish();
       }},
      {"IndirectEmpty", QueueFault::kIndirectBadLength,
       [](TestGuest&, DriverQueue& d) { one_descriptor(d, kTable, 0, VIRTQ_DESC_F_INDIRECT); }},
      {"IndirectRagged", QueueFault::kIndirectBadLength,
       [](TestGuest&, DriverQueue& d) { one_descriptor(d, kTable, 24, VIRTQ_DESC_F_INDIRECT); }},
      {"IndirectTooLong", QueueFault::kIndirectBadLength,
       [](TestGuest&, DriverQueue& d) {
         one_descriptor(d, kTable, (kSize + 1) * 16, VIRTQ_DESC_F_INDIRECT);
       }},
      {"IndirectHuge", QueueFault::kIndirectBadLength,
       [](TestGuest&, DriverQueue& d) {
         one_descriptor(d, kTable, 0xfffffff0, VIRTQ_DESC_F_INDIRECT);
       }},
      {"IndirectOutside", QueueFault::kIndirectBadAddress,
       [](TestGuest&, DriverQueue& d) { one_descriptor(d, 0x10, 16, VIRTQ_DESC_F_INDIRECT); }},
      {"IndirectAcrossTheEnd", QueueFault::kIndirectBadAddress,
       [](TestGuest&, DriverQueue& d) {
         one_descriptor(d, TestGuest::kHighBase + TestGuest::kHighSize - 16, 32,
                        VIRTQ_DESC_F_INDIRECT);
       }},
      {"IndirectWithNext", QueueFault::kIndirectChained,
       [](TestGuest&, DriverQueue& d) {
         one_descriptor(d, kTable, 16, VIRTQ_DESC_F_INDIRECT | VIRTQ_DESC_F_NEXT, 1);
       }},
      {"IndirectInIndirect", QueueFault::kIndirectNested,
       [](TestGuest&, DriverQueue& d) {
         d.write_descriptor(kTable, 0, kTable, 16, VIRTQ_DESC_F_INDIRECT, 0);
         one_descriptor(d, kTable, 16, VIRTQ_DESC_F_INDIRECT);
       }},
      {"IndirectNextOutOfRange", QueueFault::kNextOutOfRange,
       [](TestGuest&, DriverQueue& d) {
         d.write_descriptor(kTable, 0, kTable, 1, VIRTQ_DESC_F_NEXT, 1);
         one_descriptor(d, kTable, 16, VIRTQ_DESC_F_INDIRECT);
       }},
      {"IndirectLoop", QueueFault::kLoop,
       [](TestGuest&, DriverQueue& d) {
         d.write_descriptor(kTable, 0, 0, 0, VIRTQ_DESC_F_NEXT, 1);
         d.write_descriptor(kTable, 1, 0, 0, VIRTQ_DESC_F_NEXT, 0);
         one_descriptor(d, kTable, 32, VIRTQ_DESC_F_INDIRECT);
       }},
  };
  return all;
}

class HostileQueueTest : public testing::TestWithParam<size_t> {};

TEST_P(HostileQueueTest, BreaksTheQueueAndNothingElse) {
  const Hostile& hostile = hostile_drivers()[GetParam()];
  TestGuest guest;
  DriverQueue driver(guest, kSize, true);
  Queue queue(guest.memory(), driver.layout(), kAll, kSize);
  std::vector<iovec> segments(kSize);
  Chain chain;
  hostile.act(guest, driver);
  EXPECT_TRUE(queue.has_available());
  EXPECT_EQ(queue.pop(segments, chain), Queue::Pop::kBroken);
  EXPECT_EQ(queue.fault(), hostile.fault) << fault_text(queue.fault());
  // For good, whatever the driver writes afterwards.
  driver.set_available_index(1);
  EXPECT_EQ(queue.pop(segments, chain), Queue::Pop::kBroken);
  EXPECT_TRUE(queue.enable_notifications());
}

INSTANTIATE_TEST_SUITE_P(All, HostileQueueTest, testing::Range(size_t{0}, hostile_drivers().size()),
                         [](const auto& test) {
                           return std::string(hostile_drivers()[test.param].name);
                         });

TEST_F(QueueTest, AnIndirectTableNeedsTheFeature) {
  Queue queue = device({});
  one_descriptor(driver_, TestGuest::kHighBase, 16, VIRTQ_DESC_F_INDIRECT);
  EXPECT_EQ(queue.pop(segments_, chain_), Queue::Pop::kBroken);
  EXPECT_EQ(queue.fault(), QueueFault::kIndirectNotNegotiated);
}

TEST_F(QueueTest, AChainOfMoreThanFourGiBIsRefused) {
  // Regions of such sizes are not needed: the same large buffer many times.
  const uint32_t size = TestGuest::kSize;
  std::vector<Buffer> buffers((uint64_t{1} << 32) / size + 1, {TestGuest::kBase, size, false});
  DriverQueue driver(guest_, 512, true);
  Queue queue(guest_.memory(), driver.layout(), kAll, 512);
  segments_.resize(512);
  driver.add(std::span(buffers).first(buffers.size() - 1));
  driver.publish();
  EXPECT_EQ(queue.pop(segments_, chain_), Queue::Pop::kChain);
  driver.add_indirect(buffers);
  driver.publish();
  EXPECT_EQ(queue.pop(segments_, chain_), Queue::Pop::kBroken);
  EXPECT_EQ(queue.fault(), QueueFault::kTooManyBytes);
}

TEST_F(QueueTest, LayoutsAreChecked) {
  const auto refused = [&](QueueLayout layout) {
    try {
      const Queue queue(guest_.memory(), layout, kAll, kSize);
    } catch (const base::Error& e) {
      return e.err() == EINVAL;
    }
    return false;
  };
  const QueueLayout good = driver_.layout();
  EXPECT_FALSE(refused(good));
  const auto with = [&](auto change) {
    QueueLayout layout = good;
    change(layout);
    return layout;
  };
  constexpr uint64_t kEnd = TestGuest::kBase + TestGuest::kSize;
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.size = 0; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.size = 3; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.size = 65536; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.descriptors += 8; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.available += 1; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.used += 2; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.descriptors = 0; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.descriptors = ~uint64_t{15}; })));
  // One byte too few at the end of memory.
  EXPECT_FALSE(refused(with([](QueueLayout& l) { l.used = kEnd - 72; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.used = kEnd - 68; })));
  EXPECT_FALSE(refused(with([](QueueLayout& l) { l.available = kEnd - 22; })));
  EXPECT_TRUE(refused(with([](QueueLayout& l) { l.available = kEnd - 20; })));
}

}  // namespace
}  // namespace minivmm::virtio
