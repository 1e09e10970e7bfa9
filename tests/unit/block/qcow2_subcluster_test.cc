// SPDX-License-Identifier: Apache-2.0
// Extended L2 entries: subclusters are allocated, zeroed and copied by themselves; QEMU agrees with
// what we make of them, and we with what QEMU does.
#include <cstring>

#include "base/bytes.h"
#include "base/log.h"
#include "block/formats/qcow2/check.h"
#include "qcow2_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;
constexpr uint64_t kCluster = 16 * 1024;
constexpr uint64_t kSub = 512;

class Qcow2Subclusters : public Qcow2Test {
 protected:
  void open_disk(uint64_t size, std::shared_ptr<TestFile> backing = nullptr) {
    file_ = make_test_image({.size = size, .cluster_bits = 14, .extended_l2 = true});
    node_ = open_test_image(file_, backing);
    disk_ = std::make_unique<Edge>(node_, "guest", Permissions::front_end(true));
  }
  void close_disk() {
    disk_.reset();
    node_->close();
    node_.reset();
    Edge edge(file_, "check", {});
    std::string lines;
    const auto result =
        qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    EXPECT_EQ(result.corruptions + result.leaks, 0U) << lines;
    allocated_ = result.allocated_clusters;
  }
  void write(uint64_t offset, uint64_t length, int value) {
    const Bytes bytes(length, static_cast<std::byte>(value));
    disk_->write(offset, base::SingleBuffer(std::span(bytes)));
  }
  Bytes read(uint64_t offset, uint64_t length) {
    Bytes out(length);
    disk_->read(offset, base::SingleBuffer(out.data(), out.size()));
    return out;
  }
  static Bytes filled(uint64_t length, int value) {
    return Bytes(length, static_cast<std::byte>(value));
  }
  void must(const std::string& command) { ASSERT_EQ(run(command), 0) << command << last_output_; }

  std::shared_ptr<TestFile> file_;
  std::shared_ptr<Qcow2Node> node_;
  std::unique_ptr<Edge> disk_;
  uint64_t allocated_ = 0;
};

// The point of them: a small write to an overlay copies a subcluster, not a cluster.
TEST_F(Qcow2Subclusters, ASmallWriteCopiesOnlyTheSubclustersItTouches) {
  on_fiber([&] {
    auto backing = std::make_shared<TestFile>();
    backing->set_content(filled(1 << 20, 7));
    uint64_t copied = 0;
    backing->before = [&](TestFile::Op, uint64_t, uint64_t length) { copied += length; };
    open_disk(1 << 20, backing);
    write(5 * kSub + 100, 10, 1);
    EXPECT_LE(copied, kSub);
    copied = 0;
    write(5 * kSub + 200, 10, 2);  // in place
    write(9 * kSub, 2 * kSub, 3);  // whole ones of the same cluster
    EXPECT_EQ(copied, 0U);
    write(20 * kSub + 511, 2, 4);
    EXPECT_LE(copied, 2 * kSub);
    backing->before = nullptr;
    Bytes expected = filled(kCluster, 7);
    std::memset(expected.data() + 5 * kSub + 100, 1, 10);
    std::memset(expected.data() + 5 * kSub + 200, 2, 10);
    std::memset(expected.data() + 9 * kSub, 3, 2 * kSub);
    std::memset(expected.data() + 20 * kSub + 511, 4, 2);
    EXPECT_EQ(read(0, kCluster), expected);
    close_disk();
    EXPECT_EQ(allocated_, 1U);
  });
}

TEST_F(Qcow2Subclusters, PartsOfAClusterAreZeroedByTheirBits) {
  on_fiber([&] {
    auto backing = std::make_shared<TestFile>();
    backing->set_content(filled(1 << 20, 7));
    open_disk(1 << 20, backing);
    write(0, kCluster, 1);
    disk_->write_zeroes(3 * kSub, 4 * kSub, {.no_fallback = true});
    disk_->write_zeroes(kCluster + kSub, kSub, {.no_fallback = true});  // nothing is there
    EXPECT_EQ(read(2 * kSub, kSub), filled(kSub, 1));
    EXPECT_EQ(read(3 * kSub, 4 * kSub), filled(4 * kSub, 0));
    EXPECT_EQ(read(7 * kSub, kSub), filled(kSub, 1));
    EXPECT_EQ(read(kCluster, kSub), filled(kSub, 7));
    EXPECT_EQ(read(kCluster + kSub, kSub), filled(kSub, 0));
    EXPECT_EQ(read(kCluster + 2 * kSub, kSub), filled(kSub, 7));
    const BlockStatus status = disk_->block_status(kCluster + kSub, 10 * kSub);
    EXPECT_EQ(status.length, kSub);
    EXPECT_TRUE(status.zero);
    write(4 * kSub + 10, 20, 2);  // into a zero subcluster: the rest of it stays zero
    EXPECT_EQ(read(4 * kSub, 10), filled(10, 0));
    EXPECT_EQ(read(4 * kSub + 10, 20), filled(20, 2));
    EXPECT_EQ(read(4 * kSub + 30, kSub - 30), filled(kSub - 30, 0));
    close_disk();
    EXPECT_EQ(allocated_, 1U);
  });
}

TEST_F(Qcow2Subclusters, AClusterWithoutDataIsGivenBack) {
  on_fiber([&] {
    open_disk(1 << 20);
    write(3 * kSub, 2 * kSub, 1);
    disk_->write_zeroes(3 * kSub, kSub, {.may_unmap = true});
    disk_->write_zeroes(4 * kSub, kSub, {.may_unmap = true});
    EXPECT_EQ(read(0, kCluster), filled(kCluster, 0));
    close_disk();
    EXPECT_EQ(allocated_, 0U);
  });
}

// A snapshot shares the cluster: the active disk's copy takes all data along.
TEST_F(Qcow2Subclusters, ASharedClusterIsCopiedWithAllItsData) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img is missing";
  must("qemu-img create -f raw " + path("base") + " 1M");
  must("qemu-io -f raw -c 'write -P 9 0 1M' " + path("base"));
  must("qemu-img create -f qcow2 -o extended_l2=on,cluster_size=64k -b base -F raw " +
       path("s.qcow2"));
  must("qemu-io -c 'write -P 1 4k 2k' -c 'write -P 2 40k 4k' -c 'write -z 20k 2k' " +
       path("s.qcow2"));
  must("qemu-img snapshot -c first " + path("s.qcow2"));
  on_fiber([&] {
    Handle disk = open("s.qcow2");
    write_bytes(disk, 30 * 1024, filled(100, 3));
    disk.write_zeroes(64 * 1024, 2048, {});
    EXPECT_EQ(read_bytes(disk, 4096, 2048), filled(2048, 1));
    EXPECT_EQ(read_bytes(disk, 40 * 1024, 4096), filled(4096, 2));
    close(disk);
  });
  expect_clean("s.qcow2");
  const std::string rest =
      "-c 'read -P 9 0 4k' -c 'read -P 1 4k 2k' -c 'read -P 0 20k 2k' -c 'read -P 2 40k 4k' ";
  must("qemu-io " + rest + "-c 'read -P 3 30k 100' -c 'read -P 0 64k 2k' -c 'read -P 9 66k 2k' " +
       path("s.qcow2"));
  must("qemu-img snapshot -a first " + path("s.qcow2"));
  must("qemu-io " + rest + "-c 'read -P 9 30k 100' -c 'read -P 9 64k 4k' " + path("s.qcow2"));
  expect_clean("s.qcow2");
}

TEST_F(Qcow2Subclusters, CompressedClustersAreZeroedInPart) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img is missing";
  must("qemu-img create -f raw " + path("plain") + " 1M");
  must("qemu-io -f raw -c 'write -P 6 0 1M' " + path("plain"));
  must("qemu-img convert -c -O qcow2 -o extended_l2=on " + path("plain") + " " + path("c.qcow2"));
  on_fiber([&] {
    Handle disk = open("c.qcow2");
    disk.write_zeroes(4096, 200 * 1024, {.may_unmap = true});
    write_bytes(disk, 500'000, filled(10, 1));
    close(disk);
  });
  expect_clean("c.qcow2");
  must(
      "qemu-io -c 'read -P 6 0 4k' -c 'read -P 0 4k 200k' -c 'read -P 6 204k 284000'"
      " -c 'read -P 1 500000 10' -c 'read -P 6 500010 500000' " +
      path("c.qcow2"));
}

TEST_F(Qcow2Subclusters, PreallocatedImagesAreCleanAndShowTheirBackingFile) {
  std::ofstream(path("base")) << std::string(100'000, 'x');
  create("p.qcow2", {.size = 5 << 20,
                     .cluster_bits = 14,
                     .extended_l2 = true,
                     .preallocation = Preallocation::kMetadata,
                     .backing_file = "base",
                     .backing_format = "raw"});
  on_fiber([&] {
    Handle disk = open("p.qcow2");
    EXPECT_EQ(read_bytes(disk, 50'000, 100), filled(100, 'x'));
    write_bytes(disk, 60'000, filled(5, 'y'));
    EXPECT_EQ(read_bytes(disk, 50'000, 10'000), filled(10'000, 'x'));
    EXPECT_EQ(read_bytes(disk, 60'005, 30'000), filled(30'000, 'x'));
    close(disk);
  });
  if (have_qemu()) expect_clean("p.qcow2");
}

// Turns: we change the image, then QEMU does, both agree with the model each time.
TEST_F(Qcow2Subclusters, TakesTurnsWithQemu) {
  if (!have_qemu()) GTEST_SKIP() << "qemu-img is missing";
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  constexpr uint64_t kDisk = 3 << 20;
  for (const char* options :
       {"cluster_size=16k", "cluster_size=64k,refcount_bits=1", "cluster_size=2M"}) {
    SCOPED_TRACE(options);
    Bytes model(kDisk);
    std::fill_n(model.begin(), kDisk / 2, std::byte{9});
    must("qemu-img create -f raw " + path("base") + " 1536k");
    must("qemu-io -f raw -c 'write -P 9 0 1536k' " + path("base"));
    must(fmt::format("qemu-img create -f qcow2 -o extended_l2=on,{} -b base -F raw {} {}", options,
                     path("t.qcow2"), kDisk));
    for (int round = 0; round < 6; ++round) {
      on_fiber([&] {
        Handle disk = open("t.qcow2");
        for (int i = 0; i < 25; ++i) {
          const uint64_t offset = random() % (kDisk - 70'000);
          const uint64_t length = 1 + random() % 70'000;
          const int value = 1 + static_cast<int>(random() % 200);
          if (i % 3 != 2) {
            write_bytes(disk, offset, filled(length, value));
            std::memset(model.data() + offset, value, length);
          } else {
            disk.write_zeroes(offset, length, {.may_unmap = random() % 2 == 0});
            std::memset(model.data() + offset, 0, length);
          }
        }
        close(disk);
      });
      std::string command = "qemu-io -d unmap";
      for (int i = 0; i < 15; ++i) {
        const uint64_t offset = random() % (kDisk - 70'000) / 512 * 512;
        const uint64_t length = (1 + random() % 130) * 512;
        const int value = 1 + static_cast<int>(random() % 200);
        const bool zero = i % 3 == 2;
        command +=
            zero ? fmt::format(" -c 'write -z {}{} {}'", i % 2 == 0 ? "-u " : "", offset, length)
                 : fmt::format(" -c 'write -P {} {} {}'", value, offset, length);
        std::memset(model.data() + offset, zero ? 0 : value, length);
      }
      must(command + " " + path("t.qcow2"));
      expect_clean("t.qcow2");
      std::ofstream(path("model"), std::ios::binary)
          .write(reinterpret_cast<const char*>(model.data()), static_cast<std::streamsize>(kDisk));
      must("qemu-img compare -f qcow2 -F raw " + path("t.qcow2") + " " + path("model"));
      on_fiber([&] {
        Handle disk = open("t.qcow2", false);
        EXPECT_TRUE(read_bytes(disk, 0, kDisk) == model);
        close(disk);
      });
      if (HasFailure()) return;
    }
  }
}

TEST_F(Qcow2Subclusters, ContradictoryBitsAreRefused) {
  base::set_log_level(base::LogLevel::kOff);
  on_fiber([&] {
    open_disk(1 << 20);
    write(0, kCluster, 1);
    close_disk();
    const Bytes good = file_->content();
    const auto get = [&](uint64_t at) { return base::load_be<uint64_t>(good.data() + at); };
    const uint64_t table = get(get(40)) & qcow2::kOffsetMask;
    for (const uint64_t bitmap : {uint64_t{1} << 32 | 1, ~uint64_t{0}}) {
      Bytes image = good;
      base::store_be(image.data() + table + 8, bitmap);
      auto file = std::make_shared<TestFile>();
      file->set_content(image);
      {
        Edge edge(file, "check", {});
        EXPECT_GT(qcow2::check_image(edge, [](const std::string&) {}).corruptions, 0U);
      }
      auto node = open_test_image(file);
      {
        Edge disk(node, "guest", Permissions::front_end(true));
        Bytes data(100);
        const base::SingleBuffer buffer(data.data(), data.size());
        EXPECT_EQ(error_number([&] { disk.read(0, buffer); }), EIO);
        EXPECT_EQ(error_number([&] { disk.write(0, buffer); }), EIO);
        EXPECT_EQ(error_number([&] { disk.write_zeroes(0, kSub); }), EIO);
      }
      node->close();
    }
  });
  base::set_log_level(base::LogLevel::kWarning);
}

}  // namespace
}  // namespace minivmm::block
