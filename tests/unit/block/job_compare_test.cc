// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/compare_job.h"
#include "tests/unit/block/job_fixture.h"

namespace minivmm::block {
namespace {

class CompareJobTest : public JobTest {
 protected:
  std::optional<Difference> compare(Edge& a, Edge& b, bool strict = false) {
    CompareJob job({&a, "first", a.size()}, {&b, "second", b.size()}, strict);
    return on_fiber([&] { return job.run(loops_, 8); });
  }
};

// Many workers find differences; what is told is the first one on the disk.
TEST_F(CompareJobTest, TheLowestDifferenceIsFoundWhoeverFindsOneFirst) {
  const auto seed = std::random_device{}();
  std::mt19937 random(seed);
  for (int round = 0; round < 30; ++round) {
    const uint64_t size = 10'000'000 + random() % 10'000;
    const Bytes bytes = mixture(size, random);
    Edge& a = memory(size);
    Edge& b = memory(size);
    write(a, 0, bytes);
    write(b, 0, bytes);
    ASSERT_FALSE(compare(a, b)) << "seed " << seed;
    uint64_t lowest = size;
    for (unsigned i = 0; i < 1 + random() % 4; ++i) {
      const uint64_t at = random() % size;
      write(b, at, {bytes[at] ^ std::byte{0x10}});
      lowest = std::min(lowest, at);
    }
    const auto found = compare(a, b);
    ASSERT_TRUE(found) << "seed " << seed;
    EXPECT_EQ(found->kind, Difference::Kind::kContent);
    EXPECT_EQ(found->offset, lowest / 512 * 512) << "seed " << seed;
  }
}

TEST_F(CompareJobTest, TheLongerSideMustBeZeroPastTheEndOfTheOther) {
  Edge& a = memory(1 << 20);
  Edge& b = memory(3 << 20);
  EXPECT_FALSE(compare(a, b));
  EXPECT_FALSE(compare(b, a));
  write(b, (2 << 20) + 700, {std::byte{1}});
  for (const auto& found : {compare(a, b), compare(b, a)}) {
    ASSERT_TRUE(found);
    EXPECT_EQ(found->offset, (2U << 20) + 512);
  }
}

TEST_F(CompareJobTest, AnErrorNamesSideAndOffset) {
  Edge& a = memory(2 << 20);
  Edge& b =
      open("driver=fault,op=read,offset=1M,length=1,errno=EIO,file.driver=memory,file.size=2M");
  write(a, 0, Bytes(2 << 20, std::byte{3}));
  write(b, 0, Bytes(2 << 20, std::byte{3}));
  CompareJob job({&a, "first", a.size()}, {&b, "second", b.size()}, false);
  const std::string text = on_fiber([&] { return error_text([&] { (void)job.run(loops_, 8); }); });
  EXPECT_EQ(text.find("Error while reading offset 1048576 of second"), 0U) << text;
}

}  // namespace
}  // namespace minivmm::block
