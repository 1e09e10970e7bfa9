// SPDX-License-Identifier: Apache-2.0
// What goes wrong once and then right: an error must not leave the node believing something that
// the image does not say. And what may be asked for at length: memory and space stay bounded.
#include <fmt/core.h>

#include "base/bytes.h"
#include "base/io.h"
#include "base/sync.h"
#include "block/formats/qcow2/check.h"
#include "crash_states.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;

class Qcow2Recovery : public GraphTest {
 protected:
  void open_disk(const qcow2::CreateOptions& options) {
    file_ = make_test_image(options);
    cluster_ = options.cluster_size();
    reopen();
  }
  void reopen(std::shared_ptr<Node> backing = nullptr) {
    node_ = open_test_image(file_, std::move(backing));
    disk_ = std::make_unique<Edge>(node_, "guest", Permissions::front_end(true), EdgeKind::kRoot);
  }
  void close_disk() {
    file_->before = nullptr;
    disk_.reset();
    node_->close();
    node_.reset();
  }
  // Of what a flush asks of the file, the request after `left` others fails; `left` stays above -1
  // where it did not get that far.
  bool flush_fails(int& left) {
    file_->before = [&left](TestFile::Op op, uint64_t, uint64_t) {
      const bool counts = op == TestFile::Op::kWrite || op == TestFile::Op::kFlush;
      if (counts && left-- == 0) throw base::Error(EIO, "injected");
    };
    const bool failed = error_number([&] { disk_->flush(); }) != 0;
    file_->before = nullptr;
    return failed;
  }
  void expect_clean() {
    Edge edge(file_, "check", {});
    std::string lines;
    const auto result =
        qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    EXPECT_EQ(result.corruptions + result.leaks + result.check_errors, 0U) << lines;
  }
  // Leaks are none.
  static void expect_no_corruption(const std::shared_ptr<TestFile>& file) {
    Edge edge(file, "check", {});
    std::string lines;
    const auto found =
        qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    EXPECT_EQ(found.corruptions + found.check_errors, 0U) << lines;
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

  std::shared_ptr<TestFile> file_;
  std::shared_ptr<Qcow2Node> node_;
  std::unique_ptr<Edge> disk_;
  uint64_t cluster_ = 0;
};

// The second attempt once met the refcount blocks that the first had made known, and called the
// image corrupt.
TEST_F(Qcow2Recovery, AFirstWriteThatFailedCanBeTriedAgain) {
  on_fiber([&] {
    file_ = make_test_image({.size = 1 << 20, .cluster_bits = 12});
    Bytes image = file_->content();
    base::store_be(image.data() + qcow2::kAutoclearField, uint64_t{1} << 40);
    file_->set_content(image);
    reopen();
    file_->before = [](TestFile::Op op, uint64_t, uint64_t) {
      if (op == TestFile::Op::kFlush) throw base::Error(EIO, "injected");
    };
    EXPECT_EQ(error_number([&] { write(0, 100, 1); }), EIO);
    file_->before = nullptr;
    write(0, 100, 2);
    EXPECT_EQ(read(0, 100), Bytes(100, std::byte{2}));
    close_disk();
    EXPECT_EQ(base::load_be<uint64_t>(file_->content().data() + qcow2::kAutoclearField), 0U);
    EXPECT_EQ(base::load_be<uint64_t>(file_->content().data() + qcow2::kIncompatibleField), 0U);
    expect_clean();
  });
}

// Zeroes are what the guest asked for; the recorded backing file, which this user left out, must
// not shine through for the next.
TEST_F(Qcow2Recovery, ZeroesWrittenWithoutTheBackingFileHideItLater) {
  on_fiber([&] {
    for (const unsigned version : {2U, 3U}) {
      SCOPED_TRACE(version);
      constexpr uint64_t kDisk = 256 * 1024;
      open_disk({.size = kDisk,
                 .version = version,
                 .cluster_bits = 12,
                 .backing_file = "base",
                 .backing_format = "raw"});
      write(8 * 4096, 4096, 5);
      disk_->write_zeroes(0, 8 * 4096 + 100, {});
      disk_->write_zeroes(16 * 4096 + 100, 8 * 4096, {.may_unmap = true});
      if (version == 3) disk_->discard(32 * 4096, 8 * 4096);
      close_disk();
      expect_clean();
      auto base_file = std::make_shared<TestFile>();
      base_file->set_content(Bytes(kDisk, std::byte{7}));
      reopen(base_file);
      EXPECT_EQ(read(0, 8 * 4096 + 100), Bytes(8 * 4096 + 100));
      EXPECT_EQ(read(8 * 4096 + 100, 3996), Bytes(3996, std::byte{5}));
      EXPECT_EQ(read(16 * 4096 + 100, 8 * 4096), Bytes(8 * 4096));
      if (version == 3) {
        EXPECT_EQ(read(32 * 4096, 8 * 4096), Bytes(8 * 4096));
      }
      EXPECT_EQ(read(48 * 4096, 4096), Bytes(4096, std::byte{7}));
      close_disk();
    }
  });
}

// What the commits on the way make free is freed on the way, not when the whole disk is done.
TEST_F(Qcow2Recovery, ALargeDiscardGivesSpaceBackWhileItRuns) {
  on_fiber([&] {
    constexpr uint64_t kDisk = 16 << 20;
    open_disk({.size = kDisk, .cluster_bits = 9});
    write(0, kDisk, 1);
    disk_->flush();
    std::atomic<uint64_t> punched{0};
    file_->before = [&](TestFile::Op op, uint64_t, uint64_t length) {
      if (op == TestFile::Op::kDiscard) punched += length;
      if (op == TestFile::Op::kFlush) base::io::sleep_for(std::chrono::milliseconds(1));
    };
    disk_->discard(0, kDisk);
    EXPECT_GT(punched.load(), kDisk / 4);
    close_disk();
    expect_clean();
  });
}

// New data is on its way to the device before anybody flushes, old data is left to the kernel: it
// may be written again soon.
TEST_F(Qcow2Recovery, WritebackOfNewDataIsBegunEarly) {
  on_fiber([&] {
    constexpr uint64_t kDisk = 40 << 20;
    open_disk({.size = kDisk, .cluster_bits = 16});
    for (uint64_t at = 0; at < kDisk; at += 1 << 20) write(at, 1 << 20, 1);
    const auto begun = file_->writebacks();
    ASSERT_EQ(begun.size(), 2U);  // of 16 MiB each
    EXPECT_GE(begun[0].second, 16U << 20);
    EXPECT_GE(begun[1].first, begun[0].first + (15U << 20));
    EXPECT_LE(begun[1].first + begun[1].second, file_->size());
    for (uint64_t at = 0; at < kDisk; at += 1 << 20) write(at, 1 << 20, 2);
    EXPECT_EQ(file_->writebacks().size(), 2U);
    close_disk();
  });
}

// A transient error while freeing: nothing is lost for good.
TEST_F(Qcow2Recovery, WhatCouldNotBeFreedIsFreedLater) {
  on_fiber([&] {
    // A refcount block covers 64 clusters, and few are cached.
    file_ = make_test_image({.size = 4 << 20, .cluster_bits = 9, .refcount_order = 6});
    reopen();
    write(0, 2 << 20, 1);
    close_disk();
    qcow2::Header header;
    {
      Edge edge(file_, "open", {0, Permissions::kWrite | Permissions::kResize});
      header = qcow2::read_header(edge);
    }
    const auto sizes = qcow2::choose_cache_sizes(header, std::nullopt, 1 << 20, 4096, std::nullopt);
    node_ = std::make_shared<Qcow2Node>(
        NodeConfig{"disk", false}, Qcow2Node::Children{file_, nullptr, nullptr}, header, sizes);
    disk_ = std::make_unique<Edge>(node_, "guest", Permissions::front_end(true));
    disk_->discard(0, 1 << 20);
    std::atomic<int> reads{0};
    file_->before = [&](TestFile::Op op, uint64_t, uint64_t) {
      if (op == TestFile::Op::kRead && ++reads % 5 == 3) throw base::Error(EIO, "injected");
    };
    for (int i = 0; i < 100; ++i) {
      disk_->flush();
      base::io::sleep_for(std::chrono::microseconds(200));  // the reclaim runs in the background
    }
    EXPECT_GT(reads.load(), 10);
    close_disk();
    expect_clean();
  });
}

TEST_F(Qcow2Recovery, ADiscardOfEverySecondClusterDoesNotFillTheMemory) {
  on_fiber([&] {
    constexpr uint64_t kDisk = 40 << 20;
    open_disk({.size = kDisk, .cluster_bits = 9});
    write(0, kDisk, 1);
    disk_->flush();
    const uint64_t full = file_->size();
    for (uint64_t at = 0; at < kDisk; at += 2 * cluster_) disk_->discard(at, cluster_);
    const auto& allocator = std::as_const(*node_).image().allocator();
    // The reclaim runs in the background.
    for (int i = 0; i < 10'000 && !std::as_const(*node_).image().quarantine().empty(); ++i) {
      disk_->flush();
      base::io::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_GT(allocator.listed_runs(), 1000U);
    EXPECT_LE(allocator.listed_runs(), qcow2::Allocator::kMostRuns);
    // What was forgotten is found again.
    for (uint64_t at = 0; at < kDisk; at += 2 * cluster_) write(at, cluster_, 2);
    EXPECT_LE(file_->size(), full + 16 * cluster_);
    EXPECT_EQ(read(0, cluster_), Bytes(cluster_, std::byte{2}));
    EXPECT_EQ(read(cluster_, cluster_), Bytes(cluster_, std::byte{1}));
    close_disk();
    expect_clean();
  });
}

// What a commit that failed had taken is part of the next one.
TEST_F(Qcow2Recovery, ACommitThatFailedAnywhereIsMadeUpFor) {
  on_fiber([&] {
    // One block counts 2 MiB, so there are changes of every table.
    const auto options =
        qcow2::CreateOptions{.size = 4 << 20, .cluster_bits = 12, .refcount_order = 6};
    unsigned failures = 0;
    for (int fails_at = 0;; ++fails_at) {
      SCOPED_TRACE(fmt::format("request {} of the commit", fails_at));
      open_disk(options);
      write(0, 1 << 20, 1);
      disk_->flush();
      write(1 << 20, 2 << 20, 2);
      disk_->discard(0, 512 << 10);
      int left = fails_at;
      const bool failed = flush_fails(left);
      failures += failed ? 1 : 0;
      disk_->flush();
      close_disk();
      expect_clean();
      reopen();
      EXPECT_TRUE(read(1 << 20, 2 << 20) == Bytes(2 << 20, std::byte{2}));
      EXPECT_TRUE(read(0, 512 << 10) == Bytes(512 << 10));
      close_disk();
      if (left >= 0) break;  // it did not get that far
    }
    EXPECT_GT(failures, 5U);
  });
}

// Also what nothing touches again: counts that only the commit that failed was to write.
TEST_F(Qcow2Recovery, CountsOfACommitThatFailedAreInTheNextOne) {
  on_fiber([&] {
    for (int fails_at = 0;; ++fails_at) {
      SCOPED_TRACE(fmt::format("request {} of the commit", fails_at));
      open_disk({.size = 4 << 20, .cluster_bits = 12, .refcount_order = 6});
      write(0, 1 << 20, 1);
      disk_->flush();
      // The rest of what the first block counts, and some of the next one's.
      write(1 << 20, 2 << 20, 2);
      int left = fails_at;
      const bool failed = flush_fails(left);
      disk_->flush();
      // What is on disk now, without what closing writes.
      auto now = std::make_shared<TestFile>();
      now->set_content(file_->content());
      expect_no_corruption(now);
      close_disk();
      expect_clean();
      if (!failed) break;
    }
  });
}

// The header points to a larger refcount table only when that is there.
TEST_F(Qcow2Recovery, APowerCutWhileTheRefcountTableGrowsLosesNothing) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const unsigned states = crash_states(60);
  on_fiber([&] {
    std::mt19937_64 random(seed);
    // A table of one cluster counts 2 MiB.
    open_disk({.size = 4 << 20, .cluster_bits = 9, .refcount_order = 6});
    const uint64_t flushed = 1800 << 10;
    write(0, flushed, 1);
    disk_->flush();
    const auto table = [&](const std::shared_ptr<TestFile>& file) {
      Edge edge(file, "look", {0, Permissions::kWrite | Permissions::kResize});
      return qcow2::read_header(edge).refcount_table_offset;
    };
    const uint64_t old_table = table(file_);
    const uint64_t before = file_->now();
    file_->start_log();
    write(2 << 20, 512 << 10, 2);
    disk_->flush();
    ASSERT_NE(table(file_), old_table) << "it was not to grow yet";
    for (unsigned i = 0; i < states; ++i) {
      const uint64_t cut = before + random() % (file_->now() - before + 1);
      auto after = std::make_shared<TestFile>();
      after->set_content(file_->after_power_cut(cut, random));
      expect_no_corruption(after);
      auto node = open_test_image(after, nullptr, true);
      Bytes got(flushed);
      Edge(node, "reader", {}).read(0, base::SingleBuffer(got.data(), got.size()));
      ASSERT_TRUE(got == Bytes(flushed, std::byte{1})) << "cut at " << cut;
    }
    close_disk();
  });
}

// The header points to the larger L1 table only when that is there. Each moment of it is looked at.
TEST_F(Qcow2Recovery, APowerCutWhileTheL1TableMovesLosesNothing) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const unsigned times = crash_states(10);
  on_fiber([&] {
    std::mt19937_64 random(seed);
    // A cluster of L1 entries is 2 MiB of disk.
    constexpr uint64_t kOldSize = 1900 << 10;
    open_disk({.size = kOldSize, .cluster_bits = 9});
    write(0, kOldSize, 1);
    disk_->flush();
    const uint64_t before = file_->now();
    file_->start_log();
    disk_->truncate(5 << 20);
    for (uint64_t cut = before; cut <= file_->now(); ++cut) {
      for (unsigned i = 0; i < times; ++i) {
        auto after = std::make_shared<TestFile>();
        after->set_content(file_->after_power_cut(cut, random));
        auto node = open_test_image(after, nullptr, true);
        Bytes got(kOldSize);
        Edge(node, "reader", {}).read(0, base::SingleBuffer(got.data(), got.size()));
        ASSERT_TRUE(got == Bytes(kOldSize, std::byte{1})) << "cut at " << cut;
      }
    }
    close_disk();
  });
}

// What lies behind the end of a disk is what another program left there. It is zero, durably,
// before the header says that it is part of the disk.
TEST_F(Qcow2Recovery, APowerCutWhileADiskGrowsShowsNothingOld) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const unsigned times = crash_states(10);
  on_fiber([&] {
    std::mt19937_64 random(seed);
    constexpr uint64_t kLarge = 256 << 10;
    constexpr uint64_t kSmall = (130 << 10) + 512;  // inside a cluster
    open_disk({.size = kLarge, .cluster_bits = 12});
    write(0, kLarge, 5);
    close_disk();
    Bytes image = file_->content();
    base::store_be(image.data() + 24, kSmall);
    file_->set_content(image);
    reopen();
    const uint64_t before = file_->now();
    file_->start_log();
    disk_->truncate(kLarge);
    unsigned grown = 0;
    for (uint64_t cut = before; cut <= file_->now(); ++cut) {
      for (unsigned i = 0; i < times; ++i) {
        auto after = std::make_shared<TestFile>();
        after->set_content(file_->after_power_cut(cut, random));
        auto node = open_test_image(after, nullptr, true);
        const uint64_t size = node->size();
        Bytes got(size);
        Edge(node, "reader", {}).read(0, base::SingleBuffer(got.data(), got.size()));
        Bytes wanted(size);
        std::fill_n(wanted.begin(), kSmall, std::byte{5});
        ASSERT_TRUE(got == wanted) << "cut at " << cut << ", size " << size;
        if (size == kLarge) ++grown;
      }
    }
    EXPECT_GT(grown, 0U);
    close_disk();
  });
}

// The mark "dirty" goes when the refcounts are true, and not before: whoever opens an image without
// it believes them.
TEST_F(Qcow2Recovery, APowerCutWhileLazyRefcountsAreStoredLeavesTheMarkOrTheTruth) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  const unsigned states = crash_states(100);
  on_fiber([&] {
    std::mt19937_64 random(seed);
    open_disk({.size = 4 << 20, .cluster_bits = 12, .lazy_refcounts = true});
    for (int i = 0; i < 100; ++i) write(random() % 1000 * cluster_, cluster_, 1 + i);
    disk_->flush();
    const uint64_t before = file_->now();
    file_->start_log();
    disk_.reset();
    node_->close();
    unsigned marked = 0;
    for (unsigned i = 0; i < states; ++i) {
      auto after = std::make_shared<TestFile>();
      const uint64_t cut = before + random() % (file_->now() - before + 1);
      after->set_content(file_->after_power_cut(cut, random));
      const bool dirty = [&] {
        Edge edge(after, "look", {});
        return (qcow2::read_header(edge).incompatible & qcow2::kIncompatDirty) != 0;
      }();
      if (dirty) {
        ++marked;
        continue;
      }
      expect_no_corruption(after);
    }
    EXPECT_GT(marked, 0U);
    EXPECT_LT(marked, states);
  });
}

}  // namespace
}  // namespace minivmm::block
