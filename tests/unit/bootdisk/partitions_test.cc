// SPDX-License-Identifier: Apache-2.0
// Partition tables, sound and damaged.
#include "bootdisk/partitions.h"

#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/bytes.h"
#include "tests/unit/bootdisk/memory_source.h"

namespace minivmm::bootdisk {
namespace {

using base::store_le;
using testing::SizeIs;

constexpr uint64_t kMiB = 1 << 20;

class PartitionsTest : public testing::Test {
 protected:
  void mbr(uint64_t sector, unsigned index, uint8_t type, uint32_t first, uint32_t count) {
    std::byte* const table = disk_.bytes.data() + sector * 512;
    std::byte* const entry = table + 446 + 16 * index;
    entry[4] = std::byte{type};
    store_le<uint32_t>(entry + 8, first);
    store_le<uint32_t>(entry + 12, count);
    store_le<uint16_t>(table + 510, 0xaa55);
  }
  void gpt(uint64_t block, uint32_t index, uint64_t first, uint64_t last) {
    std::byte* const header = disk_.bytes.data() + block;
    std::memcpy(header, "EFI PART", 8);
    store_le<uint64_t>(header + 72, 2);
    store_le<uint32_t>(header + 80, 128);
    store_le<uint32_t>(header + 84, 128);
    std::byte* const entry = disk_.bytes.data() + 2 * block + uint64_t{128} * index;
    entry[0] = std::byte{1};
    for (unsigned i = 0; i < 16; ++i) entry[16 + i] = static_cast<std::byte>(0x10 + i);
    store_le<uint64_t>(entry + 32, first);
    store_le<uint64_t>(entry + 40, last);
  }
  std::vector<Volume> volumes() { return find_volumes(disk_); }

  MemorySource disk_{16 * kMiB};
};

TEST_F(PartitionsTest, ADiskWithoutATableIsOneVolume) {
  ASSERT_THAT(volumes(), SizeIs(1));
  EXPECT_EQ(volumes()[0].number, 0U);
  EXPECT_EQ(volumes()[0].length, 16 * kMiB);
  disk_.bytes.resize(100);
  EXPECT_THAT(volumes(), SizeIs(1));
}

TEST_F(PartitionsTest, MbrWithLogicalPartitions) {
  store_le<uint32_t>(&disk_.bytes[440], 0xdeadbeef);
  mbr(0, 0, 0x83, 2048, 2048);
  mbr(0, 1, 0x05, 8192, 8192);
  mbr(8192, 0, 0x83, 2048, 1024);
  mbr(8192, 1, 0x05, 4096, 4096);
  mbr(8192 + 4096, 0, 0x83, 63, 512);
  const auto found = volumes();
  ASSERT_THAT(found, SizeIs(3));
  EXPECT_EQ(found[0].number, 1U);
  EXPECT_EQ(found[0].offset, kMiB);
  EXPECT_EQ(found[0].length, kMiB);
  EXPECT_EQ(found[0].part_uuid, "deadbeef-01");
  EXPECT_EQ(found[1].number, 5U);
  EXPECT_EQ(found[1].offset, (8192 + 2048) * 512U);
  EXPECT_EQ(found[2].number, 6U);
  EXPECT_EQ(found[2].offset, (8192 + 4096 + 63) * 512U);
}

TEST_F(PartitionsTest, GptWithSmallAndLargeBlocks) {
  for (const uint64_t block : {512U, 4096U}) {
    std::fill(disk_.bytes.begin(), disk_.bytes.end(), std::byte{0});
    mbr(0, 0, 0xee, 1, 0xffffffff);
    gpt(block, 0, 2048, 2048 + 99);
    gpt(block, 14, 256, 256);
    const auto found = volumes();
    ASSERT_THAT(found, SizeIs(2));
    EXPECT_EQ(found[0].number, 1U);
    EXPECT_EQ(found[0].offset, 2048 * block);
    EXPECT_EQ(found[0].length, 100 * block);
    EXPECT_EQ(found[0].part_uuid, "13121110-1514-1716-1819-1a1b1c1d1e1f");
    EXPECT_EQ(found[1].number, 15U);
  }
}

TEST_F(PartitionsTest, WhatDoesNotFitTheDiskIsLeftOut) {
  mbr(0, 0, 0x83, 2048, 0x7fffffff);
  mbr(0, 1, 0x83, 0xffffffff, 1);
  mbr(0, 2, 0x83, 2048, 16);
  EXPECT_THAT(volumes(), SizeIs(1));
  std::fill(disk_.bytes.begin(), disk_.bytes.end(), std::byte{0});
  mbr(0, 0, 0xee, 1, 0xffffffff);
  gpt(512, 0, 100, 50);
  gpt(512, 1, 100, UINT64_MAX);
  gpt(512, 2, UINT64_MAX - 1, UINT64_MAX);
  EXPECT_THAT(volumes(), SizeIs(0));
}

TEST_F(PartitionsTest, AChainThatLeadsBackEnds) {
  mbr(0, 0, 0x05, 2048, 8192);
  mbr(2048, 0, 0x83, 8, 8);
  mbr(2048, 1, 0x05, 2048, 8);  // to the next table...
  mbr(4096, 0, 0x83, 8, 8);
  mbr(4096, 1, 0x05, 2048, 8);  // ...which leads to itself
  EXPECT_LE(volumes().size(), 64U);
}

TEST_F(PartitionsTest, AnyBytesGiveVolumesInsideTheDisk) {
  const auto seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < 300; ++round) {
    disk_.bytes.assign(kMiB, std::byte{0});
    for (std::byte& b : std::span(disk_.bytes).first(8192)) b = static_cast<std::byte>(random());
    store_le<uint16_t>(&disk_.bytes[510], 0xaa55);
    if (round % 2 == 0) {
      gpt(512, 0, random() % 4096, random() % 4096);
      disk_.bytes[450] = std::byte{0xee};
    }
    for (const Volume& volume : volumes()) {
      ASSERT_LE(volume.offset, kMiB);
      ASSERT_LE(volume.length, kMiB - volume.offset);
    }
  }
}

}  // namespace
}  // namespace minivmm::bootdisk
