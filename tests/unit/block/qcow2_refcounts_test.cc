// SPDX-License-Identifier: Apache-2.0
// Refcounts above 1: raised for a whole run or not at all, at every width.
#include <cerrno>

#include "graph_fixture.h"
#include "qcow2_test_file.h"

namespace minivmm::block {
namespace {

class Qcow2Refcounts : public GraphTest, public testing::WithParamInterface<unsigned> {
 protected:
  // Calls work(refcounts, first): an image of which 300 clusters from `first` on have refcount 1.
  void with_clusters(
      const std::function<void(qcow2::Image&, qcow2::Refcounts&, uint64_t first)>& work) {
    on_fiber([&] {
      auto file =
          make_test_image({.size = 8 << 20, .cluster_bits = 12, .refcount_order = GetParam()});
      auto edge = std::make_unique<Edge>(file, "test", Permissions::format_file(true));
      qcow2::Header header = qcow2::read_header(*edge);
      const auto sizes =
          qcow2::choose_cache_sizes(header, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
      qcow2::Image image(std::move(edge), nullptr, nullptr, std::move(header), true, "test", sizes);
      image.prepare_write();
      const uint64_t first = image.allocator().allocate_together(300) >> 12;
      work(image, image.refcounts(), first);
    });
  }
  static std::vector<uint64_t> all(qcow2::Refcounts& refcounts, uint64_t first) {
    std::vector<uint64_t> out(300);
    for (uint64_t i = 0; i < 300; ++i) out[i] = refcounts.get(first + i);
    return out;
  }
  uint64_t most() const {
    return GetParam() == 6 ? ~uint64_t{0} : (uint64_t{1} << (1U << GetParam())) - 1;
  }
};

TEST_P(Qcow2Refcounts, ARunIsRaisedAsAWhole) {
  with_clusters([&](qcow2::Image& image, qcow2::Refcounts& refcounts, uint64_t first) {
    const uint64_t times = std::min<uint64_t>(most() - 1, 40);
    for (uint64_t n = 0; n < times; ++n) ASSERT_TRUE(refcounts.raise(first, 300));
    EXPECT_EQ(all(refcounts, first), std::vector<uint64_t>(300, 1 + times));
    image.commit();
    for (uint64_t n = times; n > 0; --n) {
      for (uint64_t i = 0; i < 300; ++i) ASSERT_EQ(refcounts.lower(first + i), n);
    }
  });
}

// Wider ones are not raised to their limits in a lifetime.
class Qcow2NarrowRefcounts : public Qcow2Refcounts {};

TEST_P(Qcow2NarrowRefcounts, OneAtItsLimitKeepsTheOthersAsTheyWere) {
  with_clusters([&](qcow2::Image&, qcow2::Refcounts& refcounts, uint64_t first) {
    for (uint64_t n = 1; n < most(); ++n) ASSERT_TRUE(refcounts.raise(first + 250, 1));
    const auto before = all(refcounts, first);
    EXPECT_FALSE(refcounts.raise(first, 300));
    EXPECT_EQ(all(refcounts, first), before);
  });
}

TEST_P(Qcow2Refcounts, AFreeClusterAmongThemIsCorruption) {
  with_clusters([&](qcow2::Image& image, qcow2::Refcounts& refcounts, uint64_t first) {
    refcounts.free_run(first + 299, 1);
    const auto before = all(refcounts, first);
    if (GetParam() == 0) {
      EXPECT_FALSE(refcounts.raise(first, 300));  // the first is at its limit already
      return;
    }
    try {
      (void)refcounts.raise(first, 300);
      ADD_FAILURE();
    } catch (const base::Error& e) {
      EXPECT_EQ(e.err(), EIO);
    }
    EXPECT_EQ(all(refcounts, first), before);
    EXPECT_TRUE(image.file().broken());
  });
}

INSTANTIATE_TEST_SUITE_P(Orders, Qcow2Refcounts, testing::Range(0U, 7U));
INSTANTIATE_TEST_SUITE_P(Orders, Qcow2NarrowRefcounts, testing::Range(0U, 5U));

}  // namespace
}  // namespace minivmm::block
