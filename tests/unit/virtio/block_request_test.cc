// SPDX-License-Identifier: Apache-2.0
// Requests of every kind and shape, on a device that runs.
#include <array>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "tests/unit/virtio/block_fixture.h"

namespace minivmm::virtio {
namespace {

using Kind = TestNode::Kind;

class BlockRequestTest : public BlockTest {
 protected:
  struct Range {
    uint64_t sector;
    uint32_t sectors;
    uint32_t flags;
  };
  uint8_t ranges(uint32_t type, std::initializer_list<Range> list) {
    const uint64_t at = guest_.allocate(list.size() * 16);
    uint64_t to = at;
    for (const Range& r : list) {
      guest_.store(to, r.sector);
      guest_.store(to + 8, r.sectors);
      guest_.store(to + 12, r.flags);
      to += 16;
    }
    const Buffer buffer[] = {{at, static_cast<uint32_t>(list.size() * 16), false}};
    return run(type, 0, buffer);
  }
};

TEST_F(BlockRequestTest, ConfigurationSpaceTellsTheDisk) {
  make({.logical_block_size = 4096,
        .physical_block_size = 16384,
        .num_queues = 2,
        .queue_size = 64});
  EXPECT_EQ(config<uint32_t>(0), kDiskBytes / 512);  // capacity, by halves
  EXPECT_EQ(config<uint32_t>(4), 0U);
  EXPECT_EQ(config<uint32_t>(8), 1U << 20);  // size_max
  EXPECT_EQ(config<uint32_t>(12), 62U);      // seg_max
  EXPECT_EQ(config<uint32_t>(20), 4096U);    // blk_size
  EXPECT_EQ(config<uint8_t>(24), 2);         // physical_block_exp
  EXPECT_EQ(config<uint8_t>(25), 0);         // alignment_offset
  EXPECT_EQ(config<uint16_t>(26), 4);        // min_io_size
  EXPECT_EQ(config<uint32_t>(28), 16U);      // opt_io_size
  EXPECT_EQ(config<uint8_t>(32), 1);         // writeback, before negotiation not yet in force
  EXPECT_EQ(config<uint16_t>(34), 2);        // num_queues
  EXPECT_GT(config<uint32_t>(36), 0U);       // max_discard_sectors
  EXPECT_EQ(config<uint32_t>(40), 32U);      // max_discard_seg
  EXPECT_EQ(config<uint32_t>(44), 8U);       // discard_sector_alignment
  EXPECT_GT(config<uint32_t>(48), 0U);       // max_write_zeroes_sectors
  EXPECT_EQ(config<uint32_t>(52), 32U);      // max_write_zeroes_seg
  EXPECT_EQ(config<uint8_t>(56), 1);         // write_zeroes_may_unmap
  EXPECT_EQ(config<uint32_t>(60), 0U);       // past what we have
  const uint64_t all = feature(VIRTIO_F_VERSION_1) | feature(VIRTIO_F_INDIRECT_DESC) |
                       feature(VIRTIO_F_EVENT_IDX) | feature(VIRTIO_BLK_F_SEG_MAX) |
                       feature(VIRTIO_BLK_F_SIZE_MAX) | feature(VIRTIO_BLK_F_BLK_SIZE) |
                       feature(VIRTIO_BLK_F_TOPOLOGY) | feature(VIRTIO_BLK_F_FLUSH) |
                       feature(VIRTIO_BLK_F_CONFIG_WCE) | feature(VIRTIO_BLK_F_MQ) |
                       feature(VIRTIO_BLK_F_DISCARD) | feature(VIRTIO_BLK_F_WRITE_ZEROES);
  EXPECT_EQ(offered(), all);
}

constexpr uint64_t kQueueFeatures = feature(VIRTIO_F_INDIRECT_DESC) | feature(VIRTIO_F_EVENT_IDX);

TEST_F(BlockRequestTest, IndirectDescriptorsCanBeLeftOut) {
  make({.indirect = false});
  EXPECT_EQ(offered() & kQueueFeatures, feature(VIRTIO_F_EVENT_IDX));
}

TEST_F(BlockRequestTest, TheEventIndexCanBeLeftOut) {
  make({.event_index = false});
  EXPECT_EQ(offered() & kQueueFeatures, feature(VIRTIO_F_INDIRECT_DESC));
}

TEST_F(BlockRequestTest, WrittenDataIsReadBack) {
  make();
  start();
  const auto data = pattern(8192, 1);
  ASSERT_EQ(write(16, data), VIRTIO_BLK_S_OK);
  EXPECT_EQ(node_->content(16 * 512, 8192), data);
  std::vector<std::byte> back(8192);
  last_used_.clear();
  ASSERT_EQ(read(16, back), VIRTIO_BLK_S_OK);
  EXPECT_EQ(back, data);
  // The data and the status byte.
  EXPECT_EQ(last_used_.back().length, 8193U);
}

// virtio 1.x lets the driver cut a request anywhere: devices that expect three descriptors fail
// with some guests.
TEST_F(BlockRequestTest, AnyFramingWorks) {
  make();
  start();
  const auto data = pattern(1024, 2);
  const uint64_t out = guest_.allocate(16 + 1024);
  guest_.store<uint32_t>(out, VIRTIO_BLK_T_OUT);
  guest_.store<uint64_t>(out + 8, 7);
  std::copy(data.begin(), data.end(), guest_.at(out + 16, 1024));
  const uint64_t in = guest_.allocate(1025);
  const uint64_t in_header = guest_.allocate(16);
  guest_.store<uint32_t>(in_header, VIRTIO_BLK_T_IN);
  guest_.store<uint64_t>(in_header + 8, 7);
  const std::vector<std::vector<Buffer>> writes = {
      {{out, 16 + 1024, false}, {in, 1, true}},
      {{out, 1, false},
       {out + 1, 14, false},
       {out + 15, 2, false},
       {out + 17, 1023, false},
       {in, 1, true}},
      {{out, 0, false},
       {out, 16 + 512, false},
       {out + 528, 512, false},
       {in, 0, true},
       {in, 1, true}},
  };
  for (const auto& buffers : writes) {
    for (const bool indirect : {false, true}) {
      guest_.store<uint8_t>(in, kUnanswered);
      Pending p{.status = in};
      p.head = indirect ? queues_[0]->add_indirect(buffers) : queues_[0]->add(buffers);
      used_[0][p.head] = false;
      kick();
      EXPECT_EQ(wait(p), VIRTIO_BLK_S_OK);
      EXPECT_EQ(node_->content(7 * 512, 1024), data);
      EXPECT_EQ(write(7, std::vector<std::byte>(1024)), VIRTIO_BLK_S_OK);
    }
  }
  ASSERT_EQ(write(7, data), VIRTIO_BLK_S_OK);
  const std::vector<std::vector<Buffer>> reads = {
      {{in_header, 16, false}, {in, 1025, true}},
      {{in_header, 8, false},
       {in_header + 8, 8, false},
       {in, 3, true},
       {in + 3, 1021, true},
       {in + 1024, 1, true}},
      // Readable bytes that a read has no use for.
      {{in_header, 16, false}, {out, 100, false}, {in, 1000, true}, {in + 1000, 25, true}},
  };
  for (const auto& buffers : reads) {
    std::memset(guest_.at(in, 1025), 0xee, 1025);
    Pending p{.status = in + 1024};
    p.head = queues_[0]->add_indirect(buffers);
    used_[0][p.head] = false;
    kick();
    EXPECT_EQ(wait(p), VIRTIO_BLK_S_OK);
    EXPECT_TRUE(std::equal(data.begin(), data.end(), guest_.at(in, 1024)));
  }
}

TEST_F(BlockRequestTest, SectorsOutsideTheDiskAreErrors) {
  make();
  start();
  std::vector<std::byte> sector(512);
  const uint64_t end = kDiskBytes / 512;
  EXPECT_EQ(read(end - 1, sector), VIRTIO_BLK_S_OK);
  for (const uint64_t bad : {end, end + 1, ~uint64_t{0}, ~uint64_t{0} / 512, uint64_t{1} << 55}) {
    EXPECT_EQ(read(bad, sector), VIRTIO_BLK_S_IOERR) << bad;
    EXPECT_EQ(write(bad, sector), VIRTIO_BLK_S_IOERR) << bad;
  }
  std::vector<std::byte> two(1024);
  EXPECT_EQ(read(end - 1, two), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(node_->calls(Kind::kWrite).size(), 0U);
  EXPECT_EQ(status(), kDriverOk);
}

TEST_F(BlockRequestTest, OddSizesAndTooManySegmentsAreErrors) {
  make({.queue_size = 8});
  start();
  std::vector<std::byte> odd(513);
  EXPECT_EQ(read(0, odd), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(read(0, std::span(odd).first(511)), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(read(0, std::span(odd).first(0)), VIRTIO_BLK_S_OK);
  // seg_max is 6: five and one more than that fit the ring, but only when the header is joined.
  const uint64_t at = guest_.allocate(16 + 7 * 512);
  guest_.store<uint32_t>(at, VIRTIO_BLK_T_OUT);
  guest_.store<uint64_t>(at + 8, 0);
  std::vector<Buffer> buffers{{at, 16 + 512, false}};
  for (uint64_t i = 1; i < 7; ++i) buffers.push_back({at + 16 + i * 512, 512, false});
  Pending p{.status = guest_.allocate(1)};
  buffers.push_back({p.status, 1, true});
  p.head = queues_[0]->add_indirect(buffers);
  used_[0][p.head] = false;
  kick();
  EXPECT_EQ(wait(p), VIRTIO_BLK_S_IOERR);
  // size_max
  const Buffer large[] = {{TestGuest::kBase, (1 << 20) + 512, true}};
  EXPECT_EQ(run(VIRTIO_BLK_T_IN, 0, large), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(status(), kDriverOk);
}

TEST_F(BlockRequestTest, LimitsThatWereNotNegotiatedAreNotEnforced) {
  make();
  start(0);
  const Buffer large[] = {{TestGuest::kBase + (8 << 20), (1 << 20) + 512, true}};
  EXPECT_EQ(run(VIRTIO_BLK_T_IN, 0, large), VIRTIO_BLK_S_OK);
}

TEST_F(BlockRequestTest, UnknownTypesAreUnsupported) {
  make();
  start();
  for (const uint32_t type : {2U, 3U, 5U, 14U, 0x80000000U, 0x80000001U, 0xffffffffU}) {
    EXPECT_EQ(run(type), VIRTIO_BLK_S_UNSUPP) << type;
  }
}

TEST_F(BlockRequestTest, AShortHeaderIsAnError) {
  make();
  start();
  const uint64_t at = guest_.allocate(16);
  Pending p{.status = guest_.allocate(1)};
  const Buffer buffers[] = {{at, 15, false}, {p.status, 1, true}};
  p.head = queues_[0]->add(buffers);
  kick();
  EXPECT_EQ(wait(p), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(status(), kDriverOk);
}

TEST_F(BlockRequestTest, TheSerialIsTwentyBytes) {
  make({.serial = "12345678901234567890"});
  start();
  const uint64_t id = guest_.allocate(20);
  const Buffer buffer[] = {{id, 20, true}};
  EXPECT_EQ(run(VIRTIO_BLK_T_GET_ID, 0, buffer), VIRTIO_BLK_S_OK);
  EXPECT_EQ(std::memcmp(guest_.at(id, 20), "12345678901234567890", 20), 0);
  // A shorter buffer gets what fits, and not a byte more.
  std::memset(guest_.at(id, 20), 0, 20);
  const Buffer small[] = {{id, 4, true}};
  EXPECT_EQ(run(VIRTIO_BLK_T_GET_ID, 0, small), VIRTIO_BLK_S_OK);
  EXPECT_EQ(std::memcmp(guest_.at(id, 20), "1234\0\0\0\0", 8), 0);
}

TEST_F(BlockRequestTest, AShortSerialIsPaddedWithZeroes) {
  make({.serial = "abc"});
  start();
  const uint64_t id = guest_.allocate(20);
  std::memset(guest_.at(id, 20), 0xee, 20);
  const Buffer buffer[] = {{id, 20, true}};
  EXPECT_EQ(run(VIRTIO_BLK_T_GET_ID, 0, buffer), VIRTIO_BLK_S_OK);
  const char expected[20] = "abc";
  EXPECT_EQ(std::memcmp(guest_.at(id, 20), expected, 20), 0);
}

TEST_F(BlockRequestTest, DiscardAndWriteZeroesTakeRanges) {
  make();
  start();
  ASSERT_EQ(write(0, pattern(65536, 3)), VIRTIO_BLK_S_OK);
  node_->forget_calls();
  EXPECT_EQ(ranges(VIRTIO_BLK_T_DISCARD, {{0, 8, 0}, {16, 16, 0}}), VIRTIO_BLK_S_OK);
  auto calls = node_->calls();
  ASSERT_EQ(calls.size(), 2U);
  EXPECT_EQ(calls[0].kind, Kind::kDiscard);
  EXPECT_EQ(calls[1].offset, 8192U);
  EXPECT_EQ(calls[1].length, 8192U);
  node_->forget_calls();
  EXPECT_EQ(ranges(VIRTIO_BLK_T_WRITE_ZEROES, {{1, 3, 0}, {32, 8, 1}}), VIRTIO_BLK_S_OK);
  calls = node_->calls();
  ASSERT_EQ(calls.size(), 2U);
  EXPECT_EQ(calls[0].kind, Kind::kZero);
  EXPECT_EQ(calls[0].offset, 512U);
  EXPECT_FALSE(calls[0].unmap);
  EXPECT_TRUE(calls[1].unmap);
}

TEST_F(BlockRequestTest, BadRangesChangeNothing) {
  make();
  start();
  const uint64_t end = kDiskBytes / 512;
  for (const uint32_t type : {VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES}) {
    // A good range before the bad one must not be carried out.
    EXPECT_EQ(ranges(type, {{0, 8, 0}, {end, 8, 0}}), VIRTIO_BLK_S_IOERR);
    EXPECT_EQ(ranges(type, {{0, 8, 0}, {~uint64_t{0}, 8, 0}}), VIRTIO_BLK_S_IOERR);
    EXPECT_EQ(ranges(type, {{0, 0xffffffff, 0}}), VIRTIO_BLK_S_IOERR);
    EXPECT_EQ(ranges(type, {{0, 8, 2}}), VIRTIO_BLK_S_UNSUPP);
    EXPECT_EQ(ranges(type, {}), VIRTIO_BLK_S_IOERR);
    const Buffer ragged[] = {{TestGuest::kBase, 15, false}};
    EXPECT_EQ(run(type, 0, ragged), VIRTIO_BLK_S_IOERR);
    const Buffer many[] = {{TestGuest::kBase, 33 * 16, false}};
    EXPECT_EQ(run(type, 0, many), VIRTIO_BLK_S_IOERR);
  }
  // The flag has a meaning for zeroes only.
  EXPECT_EQ(ranges(VIRTIO_BLK_T_DISCARD, {{0, 8, 1}}), VIRTIO_BLK_S_UNSUPP);
  EXPECT_TRUE(node_->calls().empty());
}

// Where zeroes are written out one range must not take seconds.
TEST_F(BlockRequestTest, ARangeLongerThanOfferedIsAnError) {
  constexpr uint64_t kMost = 32 << 20;
  constexpr block::Limits kPlain{.optimal_io = 65536, .discard_granularity = 4096};
  make({}, std::make_shared<TestNode>(kMost + 4096, false, kPlain));
  start();
  EXPECT_EQ(config<uint32_t>(48), kMost / 512);  // max_write_zeroes_sectors
  EXPECT_EQ(ranges(VIRTIO_BLK_T_WRITE_ZEROES, {{0, kMost / 512 + 1, 0}}), VIRTIO_BLK_S_IOERR);
  EXPECT_TRUE(node_->calls().empty());
  EXPECT_EQ(ranges(VIRTIO_BLK_T_WRITE_ZEROES, {{8, kMost / 512, 0}}), VIRTIO_BLK_S_OK);
}

TEST_F(BlockRequestTest, WhatWasNotNegotiatedIsUnsupported) {
  make();
  start(feature(VIRTIO_BLK_F_FLUSH));
  EXPECT_EQ(ranges(VIRTIO_BLK_T_DISCARD, {{0, 8, 0}}), VIRTIO_BLK_S_UNSUPP);
  EXPECT_EQ(ranges(VIRTIO_BLK_T_WRITE_ZEROES, {{0, 8, 0}}), VIRTIO_BLK_S_UNSUPP);
}

TEST_F(BlockRequestTest, AReadOnlyDiskRefusesToChange) {
  make({}, std::make_shared<TestNode>(kDiskBytes, true));
  EXPECT_NE(offered() & feature(VIRTIO_BLK_F_RO), 0U);
  EXPECT_EQ(offered() & (feature(VIRTIO_BLK_F_DISCARD) | feature(VIRTIO_BLK_F_WRITE_ZEROES)), 0U);
  start();
  EXPECT_EQ(write(0, pattern(512, 0)), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(ranges(VIRTIO_BLK_T_DISCARD, {{0, 8, 0}}), VIRTIO_BLK_S_UNSUPP);
  std::vector<std::byte> back(512);
  EXPECT_EQ(read(0, back), VIRTIO_BLK_S_OK);
  EXPECT_EQ(flush(), VIRTIO_BLK_S_OK);
}

TEST_F(BlockRequestTest, TheOptionMakesAWritableDiskReadOnly) {
  make({.read_only = true});
  start();
  EXPECT_EQ(write(0, pattern(512, 0)), VIRTIO_BLK_S_IOERR);
  EXPECT_TRUE(node_->calls().empty());
}

TEST_F(BlockRequestTest, ErrorsOfTheDiskReachTheGuest) {
  make();
  start();
  int err = EIO;
  node_->on_call([&](const TestNode::Call&) { throw base::Error(err, "told to fail"); });
  std::vector<std::byte> data(512);
  EXPECT_EQ(read(0, data), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(write(0, data), VIRTIO_BLK_S_IOERR);
  EXPECT_EQ(flush(), VIRTIO_BLK_S_IOERR);
  err = ENOTSUP;
  EXPECT_EQ(ranges(VIRTIO_BLK_T_DISCARD, {{0, 8, 0}}), VIRTIO_BLK_S_UNSUPP);
  err = ENOSPC;
  EXPECT_EQ(write(0, data), VIRTIO_BLK_S_IOERR);
  node_->on_call(nullptr);
  EXPECT_EQ(write(0, data), VIRTIO_BLK_S_OK);
}

// --- Cache mode ---

TEST_F(BlockRequestTest, WithoutFlushEachWriteIsDurable) {
  make();
  start(0);
  EXPECT_EQ(config<uint8_t>(32), 0);
  ASSERT_EQ(write(0, pattern(512, 0)), VIRTIO_BLK_S_OK);
  EXPECT_TRUE(node_->calls(Kind::kWrite).at(0).fua);
}

TEST_F(BlockRequestTest, WithFlushWritesMayWait) {
  make();
  start(feature(VIRTIO_BLK_F_FLUSH));
  ASSERT_EQ(write(0, pattern(512, 0)), VIRTIO_BLK_S_OK);
  EXPECT_FALSE(node_->calls(Kind::kWrite).at(0).fua);
  EXPECT_EQ(flush(), VIRTIO_BLK_S_OK);
  EXPECT_EQ(node_->calls(Kind::kFlush).size(), 1U);
}

TEST_F(BlockRequestTest, TheGuestChoosesTheCacheMode) {
  make();
  start();
  EXPECT_EQ(config<uint8_t>(32), 1);
  ASSERT_EQ(write(0, pattern(512, 0)), VIRTIO_BLK_S_OK);
  const std::byte off[1] = {std::byte{0}};
  device_->write(VIRTIO_MMIO_CONFIG + 32, off);
  EXPECT_EQ(config<uint8_t>(32), 0);
  node_->forget_calls();
  ASSERT_EQ(write(8, pattern(512, 0)), VIRTIO_BLK_S_OK);
  auto calls = node_->calls();
  // The guest will send no flush any more: the first write through makes the earlier ones durable.
  ASSERT_EQ(calls.size(), 2U);
  EXPECT_TRUE(calls[0].fua);
  EXPECT_EQ(calls[1].kind, Kind::kFlush);
  node_->forget_calls();
  EXPECT_EQ(ranges(VIRTIO_BLK_T_WRITE_ZEROES, {{0, 8, 0}}), VIRTIO_BLK_S_OK);
  calls = node_->calls();
  ASSERT_EQ(calls.size(), 1U);
  EXPECT_TRUE(calls[0].fua);
  const std::byte on[1] = {std::byte{1}};
  device_->write(VIRTIO_MMIO_CONFIG + 32, on);
  node_->forget_calls();
  ASSERT_EQ(write(8, pattern(512, 0)), VIRTIO_BLK_S_OK);
  EXPECT_FALSE(node_->calls().at(0).fua);
}

// A write that is acknowledged is durable, and so is what was acknowledged before: a second write
// through must not overtake the flush that the first one waits for.
TEST_F(BlockRequestTest, NoWriteThroughOvertakesTheFlushOfEarlierWrites) {
  make();
  start();
  ASSERT_EQ(write(0, pattern(512, 0)), VIRTIO_BLK_S_OK);
  const std::byte off[1] = {std::byte{0}};
  device_->write(VIRTIO_MMIO_CONFIG + 32, off);
  base::Event flushes_go_on;
  node_->on_call([&](const TestNode::Call& call) {
    if (call.kind == Kind::kFlush) flushes_go_on.wait();
  });
  const Pending first = add_write(8, pattern(512, 1));
  kick();
  eventually([&] { return node_->calls(Kind::kFlush).size() == 1; }, "a flush");
  const Pending second = add_write(64, pattern(512, 2));
  kick();
  eventually([&] { return node_->calls(Kind::kWrite).size() == 3; }, "another write");
  ::usleep(10'000);
  EXPECT_NE(status_of(second), VIRTIO_BLK_S_OK);
  flushes_go_on.set();
  EXPECT_EQ(wait(first), VIRTIO_BLK_S_OK);
  EXPECT_EQ(wait(second), VIRTIO_BLK_S_OK);
  node_->on_call({});
}

// As above where the first request after the change is no write of data.
TEST_F(BlockRequestTest, ZeroesAndDiscardsAlsoMakeEarlierWritesDurable) {
  make();
  start();
  const std::byte off[1] = {std::byte{0}};
  const std::byte on[1] = {std::byte{1}};
  for (const uint32_t type : {VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD}) {
    device_->write(VIRTIO_MMIO_CONFIG + 32, on);
    ASSERT_EQ(write(0, pattern(512, 0)), VIRTIO_BLK_S_OK);
    device_->write(VIRTIO_MMIO_CONFIG + 32, off);
    node_->forget_calls();
    EXPECT_EQ(ranges(type, {{8, 8, 0}}), VIRTIO_BLK_S_OK);
    EXPECT_EQ(node_->calls(Kind::kFlush).size(), 1U);
    EXPECT_EQ(ranges(type, {{8, 8, 0}}), VIRTIO_BLK_S_OK);
    EXPECT_EQ(node_->calls(Kind::kFlush).size(), 1U) << "once is enough";
  }
}

TEST_F(BlockRequestTest, TheCacheModeIsFixedWithoutTheFeature) {
  make();
  start(feature(VIRTIO_BLK_F_FLUSH));
  const std::byte off[1] = {std::byte{0}};
  device_->write(VIRTIO_MMIO_CONFIG + 32, off);
  EXPECT_EQ(config<uint8_t>(32), 1);
  // Nor can it be turned on by a driver that does not flush.
  start(feature(VIRTIO_BLK_F_CONFIG_WCE));
  const std::byte on[1] = {std::byte{1}};
  device_->write(VIRTIO_MMIO_CONFIG + 32, on);
  EXPECT_EQ(config<uint8_t>(32), 0);
}

TEST_F(BlockRequestTest, ResizeIsToldWithANewGeneration) {
  make();
  start();
  std::vector<std::byte> sector(512);
  EXPECT_EQ(read(kDiskBytes / 512, sector), VIRTIO_BLK_S_IOERR);
  const uint32_t generation = get(VIRTIO_MMIO_CONFIG_GENERATION);
  (void)take_interrupts();
  device_->resize();  // the same size: nothing to tell
  EXPECT_EQ(get(VIRTIO_MMIO_CONFIG_GENERATION), generation);
  node_->grow(kDiskBytes + 4096);
  device_->resize();
  EXPECT_NE(get(VIRTIO_MMIO_CONFIG_GENERATION), generation);
  EXPECT_EQ(wait_interrupt() & VIRTIO_MMIO_INT_CONFIG, uint32_t{VIRTIO_MMIO_INT_CONFIG});
  EXPECT_EQ(config<uint64_t>(0), kDiskBytes / 512 + 8);
  EXPECT_EQ(read(kDiskBytes / 512, sector), VIRTIO_BLK_S_OK);
}

TEST_F(BlockRequestTest, APartOfABlockAtTheEndIsLeftOut) {
  make({.logical_block_size = 4096}, std::make_shared<TestNode>(kDiskBytes + 1024));
  EXPECT_EQ(config<uint64_t>(0), kDiskBytes / 512);
}

TEST(BlockOptions, BadOnesAreNamed) {
  const auto refused = [](const BlockOptions& options) {
    try {
      check_options(options);
    } catch (const base::Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_EQ(refused({}), "");
  EXPECT_NE(refused({.serial = std::string(21, 'x')}).find("serial"), std::string::npos);
  EXPECT_NE(refused({.logical_block_size = 513}).find("logical_block_size"), std::string::npos);
  EXPECT_NE(
      refused({.logical_block_size = 4096, .physical_block_size = 512}).find("physical_block_size"),
      std::string::npos);
  EXPECT_NE(refused({.num_queues = 0}).find("num-queues"), std::string::npos);
  EXPECT_NE(refused({.queue_size = 100}).find("queue-size"), std::string::npos);
}

}  // namespace
}  // namespace minivmm::virtio
