// SPDX-License-Identifier: Apache-2.0
// Copies that do not pass through this process: between files, into and out of qcow2 images. What
// a copy may not do is be wrong without saying so, so each is compared with what reading gives.
#include <gtest/gtest.h>

#include "block/formats/qcow2/check.h"
#include "block/jobs/copy_job.h"
#include "tests/unit/block/qcow2_fixture.h"

namespace minivmm::block {
namespace {

constexpr uint64_t kCluster = 65536;
constexpr uint64_t kDisk = 32 * kCluster;

class CopyRangeTest : public Qcow2Test {
 protected:
  using Bytes = std::vector<std::byte>;
  ~CopyRangeTest() override {
    on_fiber([&] { edges_.clear(); });
  }

  Edge& open_node(const std::string& keys) {
    on_fiber([&] {
      const uint8_t uses = Permissions::kWrite | Permissions::kResize;
      edges_.push_back(std::make_unique<Edge>(graph_.add(Options::from_keys(keys)), "the test",
                                              Permissions{.uses = uses, .shares = uses}));
    });
    return *edges_.back();
  }
  Edge& raw_file(const std::string& name, const Bytes& content, const std::string& more = "") {
    std::ofstream out(path(name), std::ios::binary);
    // SAFETY: bytes as characters.
    out.write(reinterpret_cast<const char*>(content.data()),
              static_cast<std::streamsize>(content.size()));
    out.close();
    return open_node("driver=raw,file.driver=file,file.filename=" + path(name) + more);
  }
  Edge& image(const std::string& name, qcow2::CreateOptions options = {},
              const std::string& more = "") {
    options.size = kDisk;
    create(name, options);
    return open_node("driver=qcow2,file.driver=file,file.filename=" + path(name) + more);
  }

  void write(Edge& to, uint64_t offset, const Bytes& bytes) {
    on_fiber([&] { to.write(offset, base::SingleBuffer(std::span<const std::byte>(bytes))); });
  }
  Bytes read(Edge& from, uint64_t offset, uint64_t length) {
    Bytes out(length);
    on_fiber([&] { from.read(offset, base::SingleBuffer(std::span<std::byte>(out))); });
    return out;
  }
  // 0, or the errno of the refusal.
  int copy(Edge& to, uint64_t offset, uint64_t length, Edge& from, uint64_t from_offset) {
    return on_fiber(
        [&] { return error_number([&] { to.copy_range(offset, length, from, from_offset); }); });
  }
  void expect_copied(Edge& to, uint64_t offset, uint64_t length, Edge& from, uint64_t from_offset) {
    const Bytes before = read(to, 0, to.size());
    ASSERT_EQ(copy(to, offset, length, from, from_offset), 0);
    Bytes wanted = before;
    const Bytes piece = read(from, from_offset, length);
    wanted.resize(std::max<uint64_t>(wanted.size(), offset + length));
    std::copy(piece.begin(), piece.end(), wanted.begin() + static_cast<ptrdiff_t>(offset));
    EXPECT_EQ(read(to, 0, to.size()), wanted);
  }
  void close_all() {
    on_fiber([&] {
      edges_.clear();
      graph_.close();
    });
  }

  std::vector<std::unique_ptr<Edge>> edges_;
};

TEST_F(CopyRangeTest, BetweenRawFilesAtTheirOffsets) {
  Edge& from = raw_file("from", pattern_bytes(300'000, 1), ",offset=512");
  Edge& to = raw_file("to", pattern_bytes(200'000, 2), ",offset=1024");
  expect_copied(to, 1000, 150'000, from, 777);
  expect_copied(to, to.size() - 100, 5000, from, 0);  // the file grows
}

TEST_F(CopyRangeTest, ARangeThatEndsBehindTheSourceIsNotCopied) {
  Edge& from = raw_file("from", pattern_bytes(8192, 1));
  Edge& to = raw_file("to", pattern_bytes(65536, 2));
  EXPECT_EQ(copy(to, 0, 16384, from, 0), ENOTSUP);
}

// Whatever writes there would be looked at: the beginning must not become a format's.
TEST_F(CopyRangeTest, TheBeginningOfAGuessedRawDiskIsNotCopiedTo) {
  Edge& from = raw_file("from", pattern_bytes(8192, 1));
  Edge& to = raw_file("to", Bytes(65536), ",probed=on");
  EXPECT_EQ(copy(to, 0, 4096, from, 0), ENOTSUP);
  expect_copied(to, 8192, 4096, from, 0);
}

// Clusters in any order, and those that only the backing file has.
TEST_F(CopyRangeTest, OutOfAnImageAndItsBackingFile) {
  const Bytes base = pattern_bytes(kDisk, 3);
  std::ofstream(path("base"), std::ios::binary)
      // SAFETY: bytes as characters.
      .write(reinterpret_cast<const char*>(base.data()), static_cast<std::streamsize>(base.size()));
  Edge& from =
      image("from", {},
            ",backing.driver=raw,backing.file.driver=file,backing.file.filename=" + path("base"));
  for (const uint64_t cluster : {9, 3, 4, 20, 8}) {
    write(from, cluster * kCluster, pattern_bytes(kCluster, cluster));
  }
  Edge& to = raw_file("to", Bytes(kDisk));
  expect_copied(to, 0, kDisk, from, 0);
  expect_copied(to, 12345, 9 * kCluster, from, 2 * kCluster + 512);
}

TEST_F(CopyRangeTest, WhatAnImageDoesNotStoreAsItReadsIsNotCopied) {
  Edge& from = image("from");
  write(from, 0, pattern_bytes(kCluster, 1));
  on_fiber([&] {
    Bytes text(kCluster, std::byte{'a'});
    from.write_compressed(kCluster, base::SingleBuffer(std::span<const std::byte>(text)));
    from.write_zeroes(2 * kCluster, kCluster);
  });
  Edge& to = raw_file("to", Bytes(kDisk));
  expect_copied(to, 0, kCluster, from, 0);
  EXPECT_EQ(copy(to, 0, kCluster, from, kCluster), ENOTSUP);      // compressed
  EXPECT_EQ(copy(to, 0, kCluster, from, 2 * kCluster), ENOTSUP);  // zeroes
  EXPECT_EQ(copy(to, 0, kCluster, from, 4 * kCluster), ENOTSUP);  // not allocated
}

TEST_F(CopyRangeTest, IntoAnImageWithRefcountsAndEntriesAsAWriteLeavesThem) {
  Edge& from = raw_file("from", pattern_bytes(kDisk, 4));
  for (const auto how : {Preallocation::kOff, Preallocation::kMetadata}) {
    for (const bool extended : {false, true}) {
      const std::string name = fmt::format("to{}{:d}", static_cast<int>(how), extended);
      qcow2::CreateOptions options;
      options.preallocation = how;
      options.extended_l2 = extended;
      Edge& to = image(name, options);
      write(to, 5 * kCluster + 100, pattern_bytes(3 * kCluster, 5));
      expect_copied(to, 4 * kCluster, 8 * kCluster, from, 3 * kCluster);
      expect_copied(to, 20 * kCluster, 12 * kCluster, from, 20 * kCluster);
      write(to, 25 * kCluster + 7, pattern_bytes(100, 6));  // in place
    }
  }
  close_all();
  if (!have_qemu()) return;
  for (const char* name : {"to00", "to01", "to10", "to11"}) expect_clean(name);
}

// What lies around the range in its clusters would have to be read: nothing is lost or leaked.
TEST_F(CopyRangeTest, PartsOfClustersAreLeftToWriting) {
  Edge& from = raw_file("from", pattern_bytes(kDisk, 4));
  Edge& to = image("to");
  EXPECT_EQ(copy(to, 512, kCluster, from, 0), ENOTSUP);
  EXPECT_EQ(copy(to, 0, kCluster + 512, from, 0), ENOTSUP);
  write(to, 0, pattern_bytes(2 * kCluster, 5));
  expect_copied(to, 512, kCluster, from, 0);  // to data that is there
  close_all();
  if (have_qemu()) expect_clean("to");
}

// Blocks that the source gets back later are not the copy's: a discard in the image and new data
// in its place leave it alone.
TEST_F(CopyRangeTest, ACopyIsNotItsSource) {
  Edge& from = image("from");
  write(from, 0, pattern_bytes(4 * kCluster, 1));
  Edge& to = raw_file("to", Bytes(kDisk));
  expect_copied(to, 0, 4 * kCluster, from, 0);
  const Bytes copied = read(to, 0, kDisk);
  write(from, 0, pattern_bytes(2 * kCluster, 2));
  on_fiber([&] { from.discard(2 * kCluster, 2 * kCluster); });
  EXPECT_EQ(read(to, 0, kDisk), copied);
}

// A job that was asked to copy inside does it where it can, and what it cannot it writes.
TEST_F(CopyRangeTest, AJobCopiesWhatIsPossibleAndWritesTheRest) {
  Edge& from = image("from");
  write(from, kCluster, pattern_bytes(5 * kCluster, 1));
  on_fiber([&] {
    Bytes text(kCluster, std::byte{'a'});
    from.write_compressed(9 * kCluster, base::SingleBuffer(std::span<const std::byte>(text)));
  });
  write(from, 20 * kCluster + 512, pattern_bytes(1000, 2));
  Edge& to = image("to");
  DiskSource disk(from, from.size());
  CopyOptions options;
  options.copy_range = true;
  options.copy_unit = kCluster;
  options.target_is_zero = true;
  CopyJob job(disk, "from", to, "to", options);
  on_fiber([&] { job.run(loops_); });
  EXPECT_EQ(read(to, 0, kDisk), read(from, 0, kDisk));
  close_all();
  if (have_qemu()) expect_clean("to");
}

}  // namespace
}  // namespace minivmm::block
