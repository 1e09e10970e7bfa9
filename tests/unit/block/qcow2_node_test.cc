// SPDX-License-Identifier: Apache-2.0
// The qcow2 driver on whole images: what is written is read, by us and by QEMU.
#include <sys/stat.h>

#include "qcow2_fixture.h"

namespace minivmm::block {
namespace {

TEST_F(Qcow2Test, WhatIsWrittenIsReadAfterReopening) {
  create("a.qcow2", {.size = 64 << 20});
  const auto data = pattern_bytes(300'000, 1);
  on_fiber([&] {
    Handle disk = open("a.qcow2");
    write_bytes(disk, 12345, data);
    EXPECT_EQ(read_bytes(disk, 12345, data.size()), data);
    close(disk);
    disk = open("a.qcow2");
    EXPECT_EQ(read_bytes(disk, 12345, data.size()), data);
    EXPECT_EQ(read_bytes(disk, 0, 12345), std::vector<std::byte>(12345));
    close(disk);
  });
  expect_clean("a.qcow2");
}

TEST_F(Qcow2Test, TheCreatedImageIsCleanForQemu) {
  for (unsigned bits = qcow2::kMinClusterBits; bits <= qcow2::kMaxClusterBits; ++bits) {
    for (const auto preallocation : {Preallocation::kOff, Preallocation::kMetadata,
                                     Preallocation::kFalloc, Preallocation::kFull}) {
      create("a.qcow2", {.size = 5'000'000,
                         .cluster_bits = bits,
                         .refcount_order = bits % 7,
                         .preallocation = preallocation});
      expect_clean("a.qcow2");
    }
  }
}

// falloc and full have the file system's blocks as well.
TEST_F(Qcow2Test, PreallocatedDataTakesRoomAndReadsAsZeroes) {
  for (const auto how : {Preallocation::kFalloc, Preallocation::kFull}) {
    create("a.qcow2", {.size = 3'000'000, .preallocation = how});
    struct stat info {};
    ASSERT_EQ(::stat(path("a.qcow2").c_str(), &info), 0);
    EXPECT_GE(info.st_blocks * 512, 3'000'000);
    on_fiber([&] {
      Handle disk = open("a.qcow2");
      EXPECT_EQ(read_bytes(disk, 0, disk.size()), std::vector<std::byte>(disk.size()));
      const BlockStatus status = disk.block_status(0, disk.size());
      EXPECT_TRUE(status.data);
      // The cluster is there: writing to it makes the file no longer.
      const auto before = std::filesystem::file_size(path("a.qcow2"));
      write_bytes(disk, 1'000'000, std::vector<std::byte>(500'000, std::byte{3}));
      disk.flush();
      EXPECT_EQ(std::filesystem::file_size(path("a.qcow2")), before);
      close(disk);
    });
    expect_clean("a.qcow2");
  }
}

// What the caches hold can be asked for.
// Where only metadata was preallocated, the file says what of the data is there: a copy need not
// read the rest.
TEST_F(Qcow2Test, DataThatIsAHoleOfTheFileIsZero) {
  create("disk.qcow2", {.size = 64 << 20, .preallocation = Preallocation::kMetadata});
  on_fiber([&] {
    Handle disk = open("disk.qcow2");
    write_bytes(disk, 8 << 20, pattern_bytes(1 << 20, 1));
    const BlockStatus before = disk.block_status(0, 64 << 20);
    EXPECT_TRUE(before.zero);
    EXPECT_TRUE(before.data);
    EXPECT_EQ(before.length, 8U << 20);
    const BlockStatus data = disk.block_status(8 << 20, 56 << 20);
    EXPECT_FALSE(data.zero);
    EXPECT_EQ(data.length, 1U << 20);
    EXPECT_TRUE(disk.block_status(9 << 20, 55 << 20).zero);
    close(disk);
  });
  // With its data it is as full as it says, and the file is not asked.
  create("full.qcow2", {.size = 4 << 20, .preallocation = Preallocation::kFull});
  on_fiber([&] {
    Handle disk = open("full.qcow2");
    EXPECT_FALSE(disk.block_status(0, 4 << 20).zero);
    close(disk);
  });
}

TEST_F(Qcow2Test, SaysWhatItHoldsInMemory) {
  create("a.qcow2", {.size = 64 << 20});
  on_fiber([&] {
    Handle disk = open("a.qcow2");
    write_bytes(disk, 0, std::vector<std::byte>(70'000, std::byte{1}));
    std::string all;
    for (const std::string& line : graph_.describe()) all += line + "\n";
    EXPECT_NE(all.find("L2 cache 4096 of "), std::string::npos) << all;
    EXPECT_NE(all.find("refcount cache 65536 of 262144 bytes, 4096 changed"), std::string::npos)
        << all;
    close(disk);
  });
}

TEST_F(Qcow2Test, AnImageOfQemuIsReadAndWritten) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img is missing";
  ASSERT_EQ(run("qemu-img create -f qcow2 " + path("q.qcow2") + " 10M"), 0) << last_output_;
  ASSERT_EQ(run("qemu-io -c 'write -P 7 100000 200000' " + path("q.qcow2")), 0) << last_output_;
  on_fiber([&] {
    Handle disk = open("q.qcow2");
    EXPECT_EQ(read_bytes(disk, 100000, 200000), std::vector<std::byte>(200000, std::byte{7}));
    write_bytes(disk, 90000, std::vector<std::byte>(20000, std::byte{9}));
    close(disk);
  });
  expect_clean("q.qcow2");
  EXPECT_EQ(
      run("qemu-io -c 'read -P 9 90000 20000' -c 'read -P 7 110000 190000' " + path("q.qcow2")), 0)
      << last_output_;
}

// Reads and copy-on-write go through all layers on the stacks of fibers.
TEST_F(Qcow2Test, ALongBackingChainIsReadToItsEnd) {
  constexpr int kLayers = 60;
  const auto name = [](int i) { return fmt::format("layer{}.qcow2", i); };
  for (int i = 0; i < kLayers; ++i) {
    qcow2::CreateOptions options{.size = 1 << 20};
    if (i > 0) {
      options.backing_file = name(i - 1);
      options.backing_format = "qcow2";
    }
    create(name(i), options);
  }
  const auto data = pattern_bytes(100'000, 4);
  on_fiber([&] {
    Handle disk = open(name(0));
    write_bytes(disk, 1000, data);
    close(disk);
    disk = open(name(kLayers - 1));
    EXPECT_EQ(read_bytes(disk, 1000, data.size()), data);
    EXPECT_EQ(disk.block_status(0, 1).depth, static_cast<unsigned>(kLayers - 1));
    write_bytes(disk, 50'000, std::vector<std::byte>(10, std::byte{1}));
    EXPECT_EQ(read_bytes(disk, 40'000, 10'000),
              std::vector<std::byte>(data.begin() + 39'000, data.begin() + 49'000));
    close(disk);
  });
}

}  // namespace
}  // namespace minivmm::block
