// SPDX-License-Identifier: Apache-2.0
#include <random>
#include <vector>

#include "block/jobs/extent_cursor.h"
#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

// A source of the given extents.
class ListSource final : public CopySource {
 public:
  explicit ListSource(std::vector<SourceExtent> extents) : extents_(std::move(extents)) {}
  uint64_t size() const noexcept override {
    return extents_.empty() ? 0 : extents_.back().offset + extents_.back().length;
  }
  void read(uint64_t, IoSpan) override {}
  SourceExtent extent(uint64_t offset, uint64_t length) override {
    for (const SourceExtent& e : extents_) {
      if (offset < e.offset || offset >= e.offset + e.length) continue;
      return {offset, std::min(length, e.offset + e.length - offset), e.kind};
    }
    return {offset, length, ExtentKind::kZero};
  }
  void copy_to(Edge&, uint64_t, uint64_t, uint64_t) override {}

  ExtentKind kind_at(uint64_t offset) { return extent(offset, 1).kind; }

 private:
  std::vector<SourceExtent> extents_;
};

class ExtentCursorTest : public GraphTest {
 protected:
  std::vector<Batch> all(ExtentCursor& cursor) {
    return on_fiber([&] {
      std::vector<Batch> out;
      for (Batch batch; cursor.next(batch);) out.push_back(batch);
      return out;
    });
  }
  static ListSource random_source(std::mt19937& random) {
    std::vector<SourceExtent> extents;
    uint64_t at = 0;
    for (unsigned i = 0; i < 1 + random() % 40; ++i) {
      const uint64_t length = 1 + random() % 100'000;
      extents.push_back({at, length, static_cast<ExtentKind>(random() % 3)});
      at += length;
    }
    return ListSource(std::move(extents));
  }
};

// Nothing twice, nothing left out, nothing that is data taken for something else.
TEST_F(ExtentCursorTest, BatchesCoverTheSourceOnce) {
  const auto seed = std::random_device{}();
  std::mt19937 random(seed);
  for (int round = 0; round < 200; ++round) {
    ListSource source = random_source(random);
    const uint64_t batch_size = uint64_t{4096} << (random() % 6);
    const uint64_t align = random() % 2 != 0 ? 1 : std::min<uint64_t>(batch_size, 16384);
    ExtentCursor cursor(source, batch_size, align);
    uint64_t at = 0;
    for (const Batch& batch : all(cursor)) {
      ASSERT_EQ(batch.offset, at) << "seed " << seed;
      uint64_t data = 0;
      for (const SourceExtent& extent : batch.extents) {
        ASSERT_EQ(extent.offset, at) << "seed " << seed;
        ASSERT_GT(extent.length, 0U);
        ASSERT_EQ(extent.offset % align, 0U);
        if (extent.kind == ExtentKind::kData) data += extent.length;
        for (const uint64_t probe : {extent.offset, extent.offset + extent.length / 2,
                                     extent.offset + extent.length - 1}) {
          // With an alignment holes may become data, never the other way round.
          if (extent.kind != ExtentKind::kData || align == 1) {
            ASSERT_EQ(source.kind_at(probe), extent.kind) << "seed " << seed << " at " << probe;
          }
        }
        at += extent.length;
      }
      ASSERT_EQ(batch.data_bytes, data);
      ASSERT_LE(data, batch_size) << "more than a request's buffer";
    }
    EXPECT_EQ(at, source.size()) << "seed " << seed;
  }
}

TEST_F(ExtentCursorTest, AnErrorLeavesItWhereItWas) {
  class Failing final : public CopySource {
   public:
    uint64_t size() const noexcept override { return 8192; }
    void read(uint64_t, IoSpan) override {}
    SourceExtent extent(uint64_t offset, uint64_t) override {
      if (offset >= 4096 && failures-- > 0) throw base::Error(EIO, "no");
      return {offset, 4096, ExtentKind::kData};
    }
    void copy_to(Edge&, uint64_t, uint64_t, uint64_t) override {}
    int failures = 1;
  };
  Failing source;
  ExtentCursor cursor(source, 4096);
  Batch batch;
  on_fiber([&] {
    EXPECT_TRUE(cursor.next(batch));
    EXPECT_THROW((void)cursor.next(batch), base::Error);
    EXPECT_TRUE(cursor.next(batch));
    EXPECT_EQ(batch.offset, 4096U);
    EXPECT_FALSE(cursor.next(batch));
  });
}

}  // namespace
}  // namespace minivmm::block
