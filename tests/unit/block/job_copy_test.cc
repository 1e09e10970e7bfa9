// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>

#include "block/jobs/copy_job.h"
#include "tests/unit/block/job_fixture.h"

namespace minivmm::block {
namespace {

class CopyJobTest : public JobTest {
 protected:
  void copy(CopySource& source, Edge& target, CopyOptions options = {}) {
    CopyJob job(source, "source", target, "target", std::move(options));
    on_fiber([&] { job.run(loops_); });
  }
  // What goes wrong with it. An exception stays on its loop.
  base::Error failure(CopySource& source, Edge& target, CopyOptions options = {}) {
    CopyJob job(source, "source", target, "target", std::move(options));
    return failure(job);
  }
  base::Error failure(CopyJob& job) {
    return on_fiber([&] {
      try {
        job.run(loops_);
      } catch (const base::Error& e) {
        return base::Error(e.err(), e.what());
      }
      return base::Error(EIO, "nothing");
    });
  }
};

// Every size, also such as end inside a request, a block and a sector, and targets that hold
// something else before.
TEST_F(CopyJobTest, TheTargetHoldsWhatTheSourceDid) {
  const auto seed = std::random_device{}();
  std::mt19937 random(seed);
  for (int round = 0; round < 30; ++round) {
    const uint64_t size = 1 + random() % 5'000'000;
    const Bytes wanted = mixture(size, random);
    Edge& source = memory(size);
    Edge& target = memory(size);
    write(source, 0, wanted);
    const bool used = random() % 2 != 0;
    if (used) write(target, 0, mixture(size, random));
    CopyOptions options;
    options.request = uint64_t{4096} << (random() % 9);
    options.requests = 1 + random() % 16;
    options.zero_bytes = (random() % 4) * 4096;
    options.target_is_zero = !used;
    DiskSource disk(source, size);
    copy(disk, target, options);
    EXPECT_EQ(content(target), wanted) << "seed " << seed << ", round " << round;
  }
}

TEST_F(CopyJobTest, SourcesFollowEachOther) {
  std::mt19937 random(1);
  const Bytes first = mixture(700'000, random);
  const Bytes second = mixture(1'300'000, random);
  Edge& a = memory(first.size());
  Edge& b = memory(second.size());
  Edge& target = memory(2'000'256);
  write(a, 0, first);
  write(b, 0, second);
  // The second one counts as 256 bytes longer than it is: zeroes.
  DiskSource disk_a(a, first.size());
  DiskSource disk_b(b, second.size() + 256);
  ConcatSource both({&disk_a, &disk_b});
  copy(both, target);
  Bytes wanted = first;
  wanted.insert(wanted.end(), second.begin(), second.end());
  wanted.resize(wanted.size() + 256);
  EXPECT_EQ(content(target), wanted);
}

TEST_F(CopyJobTest, AnErrorNamesSideAndOffset) {
  Edge& target = memory(4 << 20);
  Edge& bad =
      open("driver=fault,op=read,offset=1M,length=512,errno=EIO,file.driver=memory,file.size=4M");
  write(bad, 0, Bytes(4 << 20, std::byte{7}));
  DiskSource disk(bad, bad.size());
  const std::string text = failure(disk, target, {.request = 64 * 1024}).what();
  EXPECT_EQ(text.find("error while reading at byte 1048576 of source"), 0U) << text;

  Edge& good = memory(4 << 20);
  write(good, 0, Bytes(4 << 20, std::byte{7}));
  Edge& full =
      open("driver=fault,op=write,offset=3M,length=1,errno=ENOSPC,file.driver=memory,file.size=4M");
  DiskSource whole(good, good.size());
  const std::string other = failure(whole, full, {.request = 64 * 1024}).what();
  EXPECT_EQ(other.find("error while writing at byte 3145728 of target"), 0U) << other;
}

// One sector is lost, and nothing around it.
TEST_F(CopyJobTest, WhatCannotBeReadIsZeroWhereThatIsTolerated) {
  Edge& target = memory(1 << 20);
  Edge& bad =
      open("driver=fault,op=read,offset=5120,length=512,errno=EIO,file.driver=memory,file.size=1M");
  Bytes wanted(1 << 20, std::byte{7});
  write(bad, 0, wanted);
  std::atomic<int> told{0};
  CopyOptions options;
  options.tolerate = [&](uint64_t offset, uint64_t length, const base::Error& e) {
    EXPECT_EQ(offset, 5120U);
    EXPECT_EQ(length, 512U);
    EXPECT_EQ(e.err(), EIO);
    ++told;
    return true;
  };
  DiskSource disk(bad, bad.size());
  copy(disk, target, options);
  std::fill_n(wanted.begin() + 5120, 512, std::byte{0});
  EXPECT_EQ(content(target), wanted);
  EXPECT_EQ(told, 1);
}

TEST_F(CopyJobTest, HolesAreNotRead) {
  // Reading anything but the first megabyte fails.
  Edge& source = open("driver=fault,op=read,offset=1M,errno=EIO,file.driver=null,file.size=100G");
  class Sparse final : public CopySource {
   public:
    explicit Sparse(CopySource& below) : below_(below) {}
    uint64_t size() const noexcept override { return below_.size(); }
    void read(uint64_t offset, IoSpan to) override { below_.read(offset, to); }
    SourceExtent extent(uint64_t offset, uint64_t length) override {
      ++asked;
      if (offset < (1 << 20)) {
        return {offset, std::min<uint64_t>(length, (1 << 20) - offset), ExtentKind::kData};
      }
      return {offset, length, ExtentKind::kZero};
    }
    void copy_to(Edge&, uint64_t, uint64_t, uint64_t) override {}
    int asked = 0;

   private:
    CopySource& below_;
  };
  DiskSource disk(source, source.size());
  Sparse sparse(disk);
  Edge& target = open("driver=null,size=100G");
  copy(sparse, target, {.target_is_zero = true});
  EXPECT_LE(sparse.asked, 4) << "a long hole is one extent";
}

TEST_F(CopyJobTest, CancelEndsItBetweenRequests) {
  Edge& source = open(
      "driver=fault,op=read,errno=none,delay-ns=5000000,file.driver=memory,"
      "file.size=512M");
  Edge& target = memory(512 << 20);
  class AllData final : public CopySource {
   public:
    explicit AllData(Edge& disk) : disk_(disk) {}
    uint64_t size() const noexcept override { return disk_.size(); }
    void read(uint64_t offset, IoSpan to) override { disk_.read(offset, to); }
    SourceExtent extent(uint64_t offset, uint64_t length) override {
      return {offset, length, ExtentKind::kData};
    }
    void copy_to(Edge&, uint64_t, uint64_t, uint64_t) override {}

   private:
    Edge& disk_;
  };
  AllData all(source);
  CopyJob job(all, "source", target, "target", {.request = 64 * 1024});
  std::thread stopper([&] {
    while (job.done() == 0) std::this_thread::yield();
    job.cancel();
  });
  EXPECT_EQ(failure(job).err(), ECANCELED);
  stopper.join();
  EXPECT_LT(job.done(), all.size());
}

TEST_F(CopyJobTest, TheRateIsKept) {
  Edge& source = memory(1 << 20);
  Edge& target = memory(1 << 20);
  write(source, 0, Bytes(1 << 20, std::byte{7}));
  DiskSource disk(source, source.size());
  const auto began = std::chrono::steady_clock::now();
  copy(disk, target, {.request = 64 * 1024, .rate = 5 << 20});
  // 1 MiB at 5 MiB/s, but for the last request, whose time is not waited for.
  EXPECT_GE(std::chrono::steady_clock::now() - began, std::chrono::milliseconds(150));
  EXPECT_EQ(content(target), content(source));
}

TEST_F(CopyJobTest, NodesThatCannotStoreCompressedDataSaySo) {
  Edge& source = memory(1 << 20);
  Edge& target = memory(1 << 20);
  write(source, 0, Bytes(1 << 20, std::byte{7}));
  DiskSource disk(source, source.size());
  EXPECT_EQ(failure(disk, target, {.compressed_cluster = 65536}).err(), ENOTSUP);
}

// A layer that is too short reads as zeroes there, not as what lies below it.
TEST_F(CopyJobTest, LayersAreTakenFromTheTopAndShortOnesAreZero) {
  Edge& top = memory(3 << 20);
  Edge& middle = memory(1 << 20);
  write(top, 0, Bytes(4096, std::byte{1}));
  LayersSource layers({&top, &middle});
  const SourceExtent first = on_fiber([&] { return layers.extent(0, 3 << 20); });
  EXPECT_EQ(first.kind, ExtentKind::kData);  // memory nodes hold all of their range
  EXPECT_EQ(layers.size(), 3U << 20);
}

}  // namespace
}  // namespace minivmm::block
