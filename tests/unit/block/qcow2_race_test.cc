// SPDX-License-Identifier: Apache-2.0
// Requests that meet: the file holds one back while others run, in the orders that would hurt.
#include "base/io.h"
#include "base/sync.h"
#include "block/formats/qcow2/check.h"
#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

using Bytes = std::vector<std::byte>;
constexpr uint64_t kCluster = 4096;

class Qcow2Race : public GraphTest {
 protected:
  // A disk of 1 MiB in clusters of 4 KiB, open, with an edge on it.
  void open_disk() {
    file_ = make_test_image({.size = 1 << 20, .cluster_bits = 12});
    node_ = open_test_image(file_);
    disk_ = std::make_unique<Edge>(node_, "guest", Permissions::front_end(true));
  }
  void close_disk() {
    file_->before = nullptr;
    file_->after = nullptr;
    disk_.reset();
    node_->close();
    node_.reset();
    Edge edge(file_, "check", {});
    std::string lines;
    const auto result =
        qcow2::check_image(edge, [&](const std::string& line) { lines += line + "\n"; });
    EXPECT_EQ(result.corruptions + result.leaks, 0U) << lines;
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
  template <typename Body>
  void start(Body body) {
    running_.add();
    loops_.next().post("request", [this, body] {
      body();
      running_.done();
    });
  }
  // Holds back requests for which `matches` is true, until released.
  void hold(std::function<bool(TestFile::Op, uint64_t, uint64_t)> matches) {
    held_.reset();
    release_.reset();
    file_->before = [this, matches](TestFile::Op op, uint64_t offset, uint64_t length) {
      if (!matches(op, offset, length)) return;
      held_.set();
      release_.wait();
    };
  }

  std::shared_ptr<TestFile> file_;
  std::shared_ptr<Qcow2Node> node_;
  std::unique_ptr<Edge> disk_;
  base::WaitGroup running_;
  base::Event held_;
  base::Event release_;
};

// Both would allocate; the second's link would lose the first's half.
TEST_F(Qcow2Race, TwoWritersToOneNewClusterKeepBothHalves) {
  on_fiber([&] {
    open_disk();
    hold([](TestFile::Op op, uint64_t, uint64_t length) {
      return op == TestFile::Op::kWrite && length < kCluster && length >= 1000;
    });
    start([&] { write(0, 1000, 1); });
    held_.wait();
    start([&] { write(2000, 1000, 2); });
    base::io::sleep_for(std::chrono::milliseconds(5));
    release_.set();
    running_.wait();
    EXPECT_EQ(read(0, 1000), Bytes(1000, std::byte{1}));
    EXPECT_EQ(read(2000, 1000), Bytes(1000, std::byte{2}));
    EXPECT_EQ(read(1000, 1000), Bytes(1000));
    close_disk();
  });
}

// An allocation that waits for its data must not hold up another cluster's.
TEST_F(Qcow2Race, WritersToDifferentClustersDoNotWaitForEachOther) {
  on_fiber([&] {
    open_disk();
    write(500 * 1024, 10, 9);  // the L2 table is there
    hold([](TestFile::Op op, uint64_t, uint64_t length) {
      return op == TestFile::Op::kWrite && length == 1001;
    });
    start([&] { write(0, 1001, 1); });
    held_.wait();
    write(kCluster, 500, 2);
    EXPECT_EQ(read(kCluster, 500), Bytes(500, std::byte{2}));
    release_.set();
    running_.wait();
    EXPECT_EQ(read(0, 1001), Bytes(1001, std::byte{1}));
    close_disk();
  });
}

// The write is on its way to a host cluster; a discard frees that, and whoever gets it next must
// not find the late data in it.
TEST_F(Qcow2Race, AClusterIsNotReusedWhileAWriteToItRuns) {
  on_fiber([&] {
    open_disk();
    write(0, kCluster, 1);
    disk_->flush();
    hold([](TestFile::Op op, uint64_t, uint64_t length) {
      return op == TestFile::Op::kWrite && length == 1234;
    });
    start([&] { write(0, 1234, 2); });
    held_.wait();
    disk_->discard(0, kCluster);
    disk_->flush();
    for (uint64_t i = 1; i < 40; ++i) {
      write(i * kCluster, kCluster, 3);
      disk_->flush();
    }
    release_.set();
    running_.wait();
    disk_->flush();
    for (uint64_t i = 1; i < 40; ++i) {
      ASSERT_EQ(read(i * kCluster, kCluster), Bytes(kCluster, std::byte{3})) << i;
    }
    EXPECT_EQ(read(0, kCluster), Bytes(kCluster));
    close_disk();
  });
}

TEST_F(Qcow2Race, AClusterIsNotReusedWhileAReadOfItRuns) {
  on_fiber([&] {
    open_disk();
    write(0, kCluster, 1);
    disk_->flush();
    hold([](TestFile::Op op, uint64_t, uint64_t length) {
      return op == TestFile::Op::kRead && length == 1234;
    });
    Bytes seen;
    start([&] { seen = read(0, 1234); });
    held_.wait();
    disk_->discard(0, kCluster);
    disk_->flush();
    for (uint64_t i = 1; i < 40; ++i) {
      write(i * kCluster, kCluster, 3);
      disk_->flush();
    }
    release_.set();
    running_.wait();
    EXPECT_TRUE(seen == Bytes(1234, std::byte{1}) || seen == Bytes(1234)) << "a stranger's data";
    close_disk();
  });
}

// Freed clusters do come back: the file must not grow for ever.
TEST_F(Qcow2Race, DiscardedClustersAreUsedAgain) {
  on_fiber([&] {
    open_disk();
    uint64_t after_first = 0;
    for (int round = 0; round < 50; ++round) {
      write(0, 64 * kCluster, round + 1);
      disk_->discard(0, 64 * kCluster);
      disk_->flush();
      base::io::sleep_for(std::chrono::milliseconds(1));  // the reclaim runs in the background
      disk_->flush();
      if (round == 4) after_first = file_->size();
    }
    EXPECT_LE(file_->size(), after_first + 64 * kCluster);
    close_disk();
  });
}

TEST_F(Qcow2Race, AFailedDataWriteLinksNothingAndLosesNothing) {
  on_fiber([&] {
    open_disk();
    write(500 * 1024, 10, 9);
    file_->before = [](TestFile::Op op, uint64_t, uint64_t length) {
      if (op == TestFile::Op::kWrite && length == 1000) throw base::Error(EIO, "injected");
    };
    EXPECT_EQ(error_number([&] { write(0, 1000, 1); }), EIO);
    EXPECT_EQ(read(0, 1000), Bytes(1000));
    write(0, 999, 2);
    EXPECT_EQ(read(0, 999), Bytes(999, std::byte{2}));
    EXPECT_EQ(read(999, 3), Bytes(3));
    close_disk();
  });
}

TEST_F(Qcow2Race, AFullFileFailsWritesUntilThereIsRoom) {
  on_fiber([&] {
    open_disk();
    write(0, 10 * kCluster, 1);
    disk_->flush();
    file_->most_bytes = file_->size() + 2 * kCluster;
    int failures = 0;
    for (uint64_t i = 10; i < 40; ++i) {
      const int err = error_number([&] { write(i * kCluster, kCluster, 2); });
      if (err != 0) {
        EXPECT_EQ(err, ENOSPC);
        ++failures;
      }
    }
    EXPECT_GE(failures, 25);
    disk_->flush();
    EXPECT_EQ(read(0, 10 * kCluster), Bytes(10 * kCluster, std::byte{1}));
    write(0, 10 * kCluster, 4);  // what exists can be written
    file_->most_bytes = ~uint64_t{0};
    for (uint64_t i = 10; i < 40; ++i) write(i * kCluster, kCluster, 3);
    EXPECT_EQ(read(10 * kCluster, 30 * kCluster), Bytes(30 * kCluster, std::byte{3}));
    EXPECT_EQ(read(0, 10 * kCluster), Bytes(10 * kCluster, std::byte{4}));
    close_disk();
  });
}

TEST_F(Qcow2Race, AFailedCommitIsReportedAndTriedAgain) {
  on_fiber([&] {
    open_disk();
    write(0, kCluster, 1);
    std::atomic<bool> fail{true};
    file_->before = [&](TestFile::Op op, uint64_t, uint64_t) {
      if (op == TestFile::Op::kFlush && fail) throw base::Error(EIO, "injected");
    };
    EXPECT_EQ(error_number([&] { disk_->flush(); }), EIO);
    EXPECT_EQ(error_number([&] { disk_->flush(); }), EIO);
    fail = false;
    disk_->flush();
    const auto image = file_->content();
    auto copy = std::make_shared<TestFile>();
    copy->set_content(image);
    auto again = open_test_image(copy, nullptr, true);
    Edge edge(again, "reader", Permissions::front_end(false));
    Bytes out(kCluster);
    edge.read(0, base::SingleBuffer(out.data(), out.size()));
    EXPECT_EQ(out, Bytes(kCluster, std::byte{1}));
    close_disk();
  });
}

// Many flushes at once share commits.
TEST_F(Qcow2Race, ConcurrentFlushesAreGrouped) {
  on_fiber([&] {
    open_disk();
    file_->after = [](TestFile::Op op, uint64_t, uint64_t) {
      if (op == TestFile::Op::kFlush) base::io::sleep_for(std::chrono::milliseconds(1));
    };
    const uint64_t before = node_->image().commits();
    for (uint64_t i = 0; i < 32; ++i) {
      start([&, i] {
        write(i * kCluster, kCluster, 1);
        disk_->flush();
      });
    }
    running_.wait();
    EXPECT_LT(node_->image().commits() - before, 16U);
    close_disk();
  });
}

// A cache of few slices works, and stays about as small as it was told to be.
TEST_F(Qcow2Race, TheMetadataCacheStaysWithinItsBound) {
  on_fiber([&] {
    file_ = make_test_image({.size = 16 << 20, .cluster_bits = 9});
    node_ = open_test_image(file_, nullptr, false, 16 * 1024);
    disk_ = std::make_unique<Edge>(node_, "guest", Permissions::front_end(true));
    std::mt19937_64 random(5);
    for (int i = 0; i < 4000; ++i) write(random() % (16 << 20) / 512 * 512, 512, i);
    EXPECT_LE(node_->image().l2().stats().bytes, 20 * 1024U);
    EXPECT_GT(node_->image().l2().stats().loads, 100U);
    close_disk();
  });
}

}  // namespace
}  // namespace minivmm::block
