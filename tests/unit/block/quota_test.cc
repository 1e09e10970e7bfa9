// SPDX-License-Identifier: Apache-2.0
// A bound on how far a file may grow.
#include "block/filters/quota.h"

#include <string>

#include <gtest/gtest.h>

#include "block/protocols/memory.h"
#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

using base::SingleBuffer;

class QuotaTest : public GraphTest {
 protected:
  // A file of `size` bytes that could grow to 1 MiB by itself.
  std::shared_ptr<Node> file(uint64_t size) {
    return std::make_shared<MemoryNode>(NodeConfig{"file" + std::to_string(files_++), false}, size,
                                        1 << 20);
  }
  std::shared_ptr<QuotaNode> quota(uint64_t limit, uint64_t size = 0) {
    return std::make_shared<QuotaNode>(NodeConfig{"quota", false}, file(size), limit, shared_);
  }
  static int write(Edge& edge, uint64_t offset, uint64_t length) {
    const std::string data(length, 'x');
    return error_number([&] { edge.write(offset, SingleBuffer(data.data(), data.size())); });
  }

  std::shared_ptr<SpaceBudget> shared_ = std::make_shared<SpaceBudget>(10'000);
  int files_ = 0;
};

TEST_F(QuotaTest, AFileGrowsToItsBoundAndNoFurther) {
  on_fiber([&] {
    Edge edge(quota(8192), "a format", Permissions::format_file(true));
    EXPECT_EQ(write(edge, 0, 8192), 0);
    EXPECT_EQ(write(edge, 8192, 1), ENOSPC);
    EXPECT_EQ(write(edge, 8000, 193), ENOSPC);
    EXPECT_EQ(error_number([&] { edge.write_zeroes(8192, 4096); }), ENOSPC);
    EXPECT_EQ(error_number([&] { edge.truncate(8193); }), ENOSPC);
    EXPECT_EQ(edge.size(), 8192U);
    // What is inside goes on.
    EXPECT_EQ(write(edge, 100, 1000), 0);
  });
}

TEST_F(QuotaTest, SeveralShareABudgetAndGiveItBackAtTheirEnd) {
  on_fiber([&] {
    auto first = std::make_unique<Edge>(quota(~uint64_t{0}), "a", Permissions::format_file(true));
    Edge second(quota(~uint64_t{0}), "b", Permissions::format_file(true));
    EXPECT_EQ(write(*first, 0, 6000), 0);
    EXPECT_EQ(write(*first, 0, 6000), 0);  // charged once
    EXPECT_EQ(write(second, 0, 4001), ENOSPC);
    EXPECT_EQ(write(second, 0, 4000), 0);
    EXPECT_EQ(shared_->used(), 10'000U);
    first.reset();
    EXPECT_EQ(shared_->used(), 4000U);
    EXPECT_EQ(write(second, 4000, 6000), 0);
  });
  EXPECT_EQ(shared_->used(), 0U);
}

// A kept clone that is opened with a smaller bound than it was made with can still be used.
TEST_F(QuotaTest, AFileThatIsTooLargeAlreadyStaysAsItIs) {
  on_fiber([&] {
    Edge edge(quota(4096, 20'000), "a format", Permissions::format_file(true));
    EXPECT_EQ(shared_->used(), 20'000U);
    EXPECT_EQ(write(edge, 19'000, 1000), 0);
    EXPECT_EQ(write(edge, 20'000, 1), ENOSPC);
    Edge other(quota(4096), "another", Permissions::format_file(true));
    EXPECT_EQ(write(other, 0, 1), ENOSPC);
  });
}

}  // namespace
}  // namespace minivmm::block
