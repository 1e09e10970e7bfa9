// SPDX-License-Identifier: Apache-2.0
// The choke point: what drivers may rely on because edges see to it.
#include "block/graph/edge.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "base/checked.h"
#include "base/io.h"
#include "base/sync.h"
#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

using base::SingleBuffer;

// Keeps content, and checks that each request keeps the promises of node.h.
class StrictNode final : public Node {
 public:
  StrictNode(uint64_t size, Limits limits) : Node("strict", "test", false), bytes_(size) {
    set_size(size);
    set_limits(limits);
  }
  std::vector<std::byte> bytes_;
  bool broken_ = false;
  int writes_ = 0;
  int durable_writes_ = 0;
  int flushes_ = 0;
  bool can_zero_ = false;

 private:
  void look(uint64_t offset, uint64_t length, bool transfers = true) {
    const Limits& l = limits();
    const uint64_t padded = base::align_up<uint64_t>(size(), l.request_alignment);
    if (length == 0 || offset % l.request_alignment != 0 || length % l.request_alignment != 0 ||
        offset + length > padded || (transfers && l.max_transfer != 0 && length > l.max_transfer)) {
      broken_ = true;
    }
    if (bytes_.size() < offset + length) bytes_.resize(offset + length);
  }
  void driver_read(uint64_t offset, IoSpan to) override {
    look(offset, to.bytes());
    base::EventLoop::current()->yield();  // lets overlapping requests in, if edges do
    base::copy_to(to, 0, {bytes_.data() + offset, to.bytes()});
  }
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override {
    look(offset, from.bytes());
    ++writes_;
    durable_writes_ += flags.fua;
    base::EventLoop::current()->yield();
    base::copy_from(from, 0, {bytes_.data() + offset, from.bytes()});
  }
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override {
    if (!can_zero_) return Node::driver_write_zeroes(offset, length, flags);
    look(offset, length, false);
    std::memset(bytes_.data() + offset, 0, length);
  }
  void driver_flush() override { ++flushes_; }
};

class EdgeTest : public GraphTest, public testing::WithParamInterface<Limits> {};

INSTANTIATE_TEST_SUITE_P(Limits, EdgeTest,
                         testing::Values(Limits{}, Limits{.request_alignment = 512},
                                         Limits{.request_alignment = 4096, .max_transfer = 8192},
                                         Limits{.request_alignment = 1, .max_transfer = 1000}),
                         [](const auto& p) {
                           return "align" + std::to_string(p.param.request_alignment) + "max" +
                                  std::to_string(p.param.max_transfer);
                         });

TEST_P(EdgeTest, RandomRequestsMatchAByteArray) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  constexpr uint64_t kSize = 50'000;  // not a multiple of any alignment
  on_fiber([&] {
    auto node = std::make_shared<StrictNode>(kSize, GetParam());
    Edge edge(node, "test", Permissions::front_end(true), EdgeKind::kRoot);
    std::vector<std::byte> model(kSize);
    for (int i = 0; i < 2000; ++i) {
      const uint64_t offset = random() % kSize;
      const uint64_t length = random() % std::min<uint64_t>(kSize - offset, 20'000) + 1;
      std::vector<std::byte> buffer(length);
      switch (random() % 3) {
        case 0: {
          edge.read(offset, SingleBuffer(std::span(buffer)));
          ASSERT_TRUE(std::equal(buffer.begin(), buffer.end(),
                                 model.begin() + static_cast<ptrdiff_t>(offset)));
          break;
        }
        case 1: {
          for (auto& b : buffer) b = static_cast<std::byte>(random());
          edge.write(offset, SingleBuffer(std::span(buffer)));
          std::copy(buffer.begin(), buffer.end(), model.begin() + static_cast<ptrdiff_t>(offset));
          break;
        }
        default:
          node->can_zero_ = random() % 2 == 0;
          edge.write_zeroes(offset, length);
          std::fill_n(model.begin() + static_cast<ptrdiff_t>(offset), length, std::byte{0});
      }
      ASSERT_FALSE(node->broken_) << "request " << i;
    }
  });
}

// Two writers of the same block that each change a part of it: without serialising the second
// read-modify-write puts back the first one's old bytes.
TEST_P(EdgeTest, UnalignedWritersOfOneBlockDoNotLoseEachOther) {
  on_fiber([&] {
    auto node = std::make_shared<StrictNode>(16384, GetParam());
    Edge edge(node, "test", Permissions::front_end(true), EdgeKind::kRoot);
    base::WaitGroup group;
    for (int i = 0; i < 64; ++i) {
      group.add();
      loops_.loop(0).spawn("writer", [&, i] {
        const std::byte mark{static_cast<unsigned char>(i + 1)};
        edge.write(static_cast<uint64_t>(i) * 100, SingleBuffer(&mark, 1));
        group.done();
      });
    }
    group.wait();
    for (size_t i = 0; i < 64; ++i) EXPECT_EQ(node->bytes_[i * 100], std::byte(i + 1));
    EXPECT_FALSE(node->broken_);
  });
}

TEST_F(GraphTest, RequestsPastTheEndAreRefusedAtTheRoot) {
  on_fiber([&] {
    auto node = std::make_shared<StrictNode>(1000, Limits{});
    Edge edge(node, "test", Permissions::front_end(true), EdgeKind::kRoot);
    std::byte buffer[10];
    EXPECT_EQ(error_number([&] { edge.read(995, SingleBuffer(buffer, 10)); }), EINVAL);
    EXPECT_EQ(error_number([&] { edge.write(995, SingleBuffer(buffer, 10)); }), ENOSPC);
    EXPECT_EQ(error_number([&] { edge.write_zeroes(~uint64_t{0}, 10); }), ENOSPC);
    EXPECT_EQ(error_number([&] { edge.discard(~uint64_t{0} - 4, 10); }), ENOSPC);
    EXPECT_EQ(error_number([&] { edge.block_status(1001, 1); }), EINVAL);
    edge.read(1000, SingleBuffer(buffer, 0));
  });
}

TEST_F(GraphTest, InnerEdgesReadZeroesPastTheEndAndGrowOnlyWithPermission) {
  on_fiber([&] {
    auto node = std::make_shared<StrictNode>(1000, Limits{});
    std::fill(node->bytes_.begin(), node->bytes_.end(), std::byte{7});
    std::byte buffer[10];
    {
      Edge edge(node, "backing of x", Permissions::backing());
      edge.read(995, SingleBuffer(buffer, 10));
      EXPECT_EQ(buffer[4], std::byte{7});
      EXPECT_EQ(buffer[5], std::byte{0});
      edge.read(5000, SingleBuffer(buffer, 10));
      EXPECT_EQ(buffer[0], std::byte{0});
      EXPECT_TRUE(edge.block_status(2000, 10).zero);
      EXPECT_EQ(error_number([&] { edge.write(0, SingleBuffer(buffer, 1)); }), EROFS);
    }
    Edge no_resize(node, "x", {Permissions::kWrite, 0});
    EXPECT_EQ(error_number([&] { no_resize.write(995, SingleBuffer(buffer, 10)); }), ENOSPC);
  });
}

// Zeroes that must be written out are made durable once, not piece by piece.
TEST_F(GraphTest, DurableZeroesAreFlushedOnce) {
  on_fiber([&] {
    auto node = std::make_shared<StrictNode>(8 << 20, Limits{});
    Edge edge(node, "test", Permissions::front_end(true), EdgeKind::kRoot);
    edge.write_zeroes(0, 5 << 20, {.fua = true});
    EXPECT_EQ(node->writes_, 10);
    EXPECT_EQ(node->durable_writes_, 0);
    EXPECT_EQ(node->flushes_, 1);
    edge.write_zeroes(0, 4096, {.fua = true});
    EXPECT_EQ(node->durable_writes_, 1);
    EXPECT_EQ(node->flushes_, 1);
  });
}

TEST_F(GraphTest, HooksComeBeforeEveryChangeAndMayRefuseIt) {
  struct Hook final : Node::BeforeWrite {
    void before_write(uint64_t offset, uint64_t length, IoSpan) override {
      seen.emplace_back(offset, length);
      if (offset == 13) throw base::Error(EPERM, "not there");
    }
    std::vector<std::pair<uint64_t, uint64_t>> seen;
  } hook;
  on_fiber([&] {
    auto node = std::make_shared<StrictNode>(8192, Limits{.can_discard = true});
    Edge edge(node, "test", Permissions::front_end(true), EdgeKind::kRoot);
    node->add_before_write(hook);
    std::byte byte{1};
    edge.write(5, SingleBuffer(&byte, 1));
    edge.write_zeroes(6, 2);
    edge.discard(8, 3);
    edge.read(0, SingleBuffer(&byte, 1));
    EXPECT_EQ(error_number([&] { edge.write(13, SingleBuffer(&byte, 1)); }), EPERM);
    node->remove_before_write(hook);
    edge.write(13, SingleBuffer(&byte, 1));
  });
  EXPECT_EQ(hook.seen,
            (std::vector<std::pair<uint64_t, uint64_t>>{{5, 1}, {6, 2}, {8, 3}, {13, 1}}));
}

TEST_F(GraphTest, ConflictsNameBothUsers) {
  on_fiber([&] {
    auto node = std::make_shared<StrictNode>(1000, Limits{});
    Edge guest(node, "guest disk 'disk0'", Permissions::front_end(true), EdgeKind::kRoot);
    Edge client(node, "NBD export 'disk0'", Permissions::front_end(true), EdgeKind::kRoot);
    const std::string text =
        error_text([&] { Edge(node, "backing of 'top'", Permissions::backing()); });
    EXPECT_NE(text.find("guest disk 'disk0'"), std::string::npos) << text;
    EXPECT_NE(text.find("backing of 'top'"), std::string::npos) << text;
  });
}

TEST_F(GraphTest, TheFirstDiscardOfAnUnalignedRangeIsShrunkNotRounded) {
  on_fiber([&] {
    class DiscardNode final : public Node {
     public:
      DiscardNode() : Node("d", "test", false) {
        set_size(100'000);
        set_limits({.discard_granularity = 4096, .can_discard = true});
      }
      std::vector<std::pair<uint64_t, uint64_t>> seen;
      void driver_read(uint64_t, IoSpan) override {}
      void driver_write(uint64_t, IoSpan, WriteFlags) override {}
      void driver_flush() override {}
      void driver_discard(uint64_t offset, uint64_t length) override {
        seen.emplace_back(offset, length);
      }
    };
    auto node = std::make_shared<DiscardNode>();
    Edge edge(node, "t", Permissions::front_end(true), EdgeKind::kRoot);
    edge.discard(100, 8000);      // holds no whole granule but [4096, 8192) - no: 100+8000 < 8192
    edge.discard(100, 9000);      // [4096, 8192)
    edge.discard(90'112, 9'888);  // up to the end: the short last block counts
    EXPECT_EQ(node->seen,
              (std::vector<std::pair<uint64_t, uint64_t>>{{4096, 4096}, {90'112, 9'888}}));
  });
}

}  // namespace
}  // namespace minivmm::block
