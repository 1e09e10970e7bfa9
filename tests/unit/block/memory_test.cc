// SPDX-License-Identifier: Apache-2.0
// Disks in memory.
#include "block/protocols/memory.h"

#include <string>
#include <sys/mman.h>

#include <gtest/gtest.h>

#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

using base::SingleBuffer;

class MemoryTest : public GraphTest {
 protected:
  void expect_zeroes_where_they_were_written() {
    on_fiber([&] {
      graph_.add(Options::from_keys("driver=memory,size=256K,node-name=m"));
      Handle handle = graph_.attach("m", "tester", Permissions::front_end(true));
      std::string content(262144, 'x');
      handle.write(0, SingleBuffer(content.data(), content.size()));
      handle.write_zeroes(1000, 200'000);
      content.replace(1000, 200'000, 200'000, '\0');
      std::string got(262144, '?');
      handle.read(0, SingleBuffer(got.data(), got.size()));
      EXPECT_TRUE(got == content);
      handle.close();
    });
  }
};

TEST_F(MemoryTest, ZeroesReadBack) { expect_zeroes_where_they_were_written(); }

// The system does not take locked pages back: then they must be overwritten.
TEST_F(MemoryTest, ZeroesReadBackWhereMemoryIsLocked) {
  if (::mlockall(MCL_FUTURE) != 0) GTEST_SKIP() << "memory cannot be locked";
  expect_zeroes_where_they_were_written();
  ::munlockall();
}

TEST_F(MemoryTest, IsFullWhereItsRoomEnds) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=1000,node-name=m"));
    Edge edge(graph_.find("m"), "a format", Permissions::format_file(true));
    char byte = 'x';
    edge.write(4095, SingleBuffer(&byte, 1));
    EXPECT_EQ(edge.size(), 4096U);
    EXPECT_EQ(error_number([&] { edge.write(4096, SingleBuffer(&byte, 1)); }), ENOSPC);
    EXPECT_EQ(error_number([&] { edge.truncate(4097); }), ENOSPC);
    // What was cut off does not come back.
    edge.truncate(4000);
    edge.truncate(4096);
    edge.read(4095, SingleBuffer(&byte, 1));
    EXPECT_EQ(byte, '\0');
  });
}

}  // namespace
}  // namespace minivmm::block
