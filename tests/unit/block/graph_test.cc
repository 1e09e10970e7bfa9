// SPDX-License-Identifier: Apache-2.0
// Nodes by name, handles, drains, lifetime.
#include "block/graph/graph.h"

#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>

#include <gtest/gtest.h>

#include "base/io.h"
#include "base/sync.h"
#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

using base::SingleBuffer;
using std::chrono::milliseconds;

TEST_F(GraphTest, NodesAreFoundByNameAndNamesAreUnique) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=null,node-name=a,size=1M"));
    EXPECT_EQ(graph_.find("a")->size(), 1U << 20);
    EXPECT_EQ(error_number([&] { graph_.add(Options::from_keys("driver=null,node-name=a")); }),
              EEXIST);
    EXPECT_NE(error_text([&] { graph_.find("b"); }).find("there are: a"), std::string::npos);
    EXPECT_NE(error_text([&] { graph_.add(Options::from_keys("driver=nosuch")); }).find("raw"),
              std::string::npos);
  });
}

// Who asked for the node above must not get the one below.
TEST_F(GraphTest, AChildMayNotHaveTheNameOfTheNodeItIsFor) {
  on_fiber([&] {
    EXPECT_EQ(error_number([&] {
                graph_.add(Options::from_keys(
                    "driver=raw,node-name=a,file.driver=memory,file.size=1M,file.node-name=a"));
              }),
              EEXIST);
    EXPECT_EQ(error_number([&] { graph_.find("a"); }), ENOENT);
  });
}

TEST_F(GraphTest, InlineChildrenAreNamedAfterTheirParents) {
  on_fiber([&] {
    graph_.add(Options::from_keys(
        "driver=raw,node-name=a,file.driver=raw,file.file.driver=memory,file.file.size=1M"));
    EXPECT_STREQ(graph_.find("a.file")->driver(), "raw");
    EXPECT_STREQ(graph_.find("a.file.file")->driver(), "memory");
    // A name that is taken, or would be long, is not made up.
    graph_.add(Options::from_keys("driver=null,node-name=b.file"));
    graph_.add(Options::from_keys("driver=null,node-name=#block0"));
    graph_.add(Options::from_keys("driver=raw,node-name=b,file.driver=memory,file.size=1M"));
    EXPECT_STREQ(graph_.find("b.file")->driver(), "null");
    EXPECT_STREQ(graph_.find("#block1")->driver(), "memory");
    const std::string name(64, 'n');
    graph_.add(Options::from_keys("driver=raw,file.driver=memory,file.size=1M,node-name=" + name));
    EXPECT_STREQ(graph_.find("#block2")->driver(), "memory");
  });
}

TEST_F(GraphTest, AFailedAddLeavesNothingBehind) {
  on_fiber([&] {
    // The child opens, then the parent's unknown option is found.
    EXPECT_NE(error_text([&] {
                graph_.add(Options::from_keys(
                    "driver=raw,node-name=top,bogus=1,file.driver=memory,file.size=1M,"
                    "file.node-name=below"));
              }).find("unknown option 'bogus'"),
              std::string::npos);
    EXPECT_EQ(error_number([&] { graph_.find("top"); }), ENOENT);
    EXPECT_EQ(error_number([&] { graph_.find("below"); }), ENOENT);
  });
}

TEST_F(GraphTest, RemoveRefusesWhatIsInUseAndTakesInlineChildrenAlong) {
  on_fiber([&] {
    graph_.add(Options::from_keys(
        "driver=raw,node-name=top,file.driver=memory,file.size=1M,file.node-name=below"));
    Handle handle = graph_.attach("top", "tester", Permissions::front_end(true));
    EXPECT_NE(error_text([&] { graph_.remove("top"); }).find("tester"), std::string::npos);
    handle.close();
    graph_.remove("top");
    EXPECT_EQ(error_number([&] { graph_.find("below"); }), ENOENT);
  });
}

TEST_F(GraphTest, ManyFrontEndsShareOneNodeButNotWithABackingUser) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=1M,node-name=m"));
    Handle a = graph_.attach("m", "guest", Permissions::front_end(true));
    Handle b = graph_.attach("m", "NBD", Permissions::front_end(true));
    char text[] = "seen by both";
    a.write(1000, SingleBuffer(text, sizeof text));
    char got[sizeof text];
    b.read(1000, SingleBuffer(got, sizeof got));
    EXPECT_STREQ(got, text);
    EXPECT_EQ(
        error_number([&] { graph_.add(Options::from_keys("driver=raw,file=m,read-only=on")); }),
        EBUSY);
    a.close();
    b.close();
  });
}

// What stands above a filter may need that nobody else changes what is below.
TEST_F(GraphTest, AFilterDoesNotLetOthersWriteBehindItsUser) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=1M,node-name=m"));
    const char* filter = "driver=fault,errno=none,node-name=f,file=m,read-only=on";
    {
      Handle writer = graph_.attach("m", "guest", Permissions::front_end(true));
      EXPECT_EQ(error_number([&] { graph_.add(Options::from_keys(filter)); }), EBUSY);
      writer.close();
    }
    graph_.add(Options::from_keys(filter));
    EXPECT_EQ(error_number([&] { graph_.attach("m", "guest", Permissions::front_end(true)); }),
              EBUSY);
  });
}

// Whoever closes a handle waits for its requests, also for those that a drain keeps out.
TEST_F(GraphTest, CloseWaitsForRequestsThatADrainHoldsBack) {
  std::atomic<bool> read{false};
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=null,size=1M,latency-ns=20000000,node-name=slow"));
    Handle handle = graph_.attach("slow", "tester", Permissions::front_end(true));
    base::WaitGroup group;
    group.add(2);
    {
      const Graph::Drain drain(graph_, milliseconds(1000));
      loops_.loop(1).post("reader", [&] {
        std::byte buffer[512];
        handle.read(0, SingleBuffer(buffer, sizeof buffer));
        read = true;
        group.done();
      });
      base::io::sleep_for(milliseconds(10));
      loops_.loop(0).spawn("closer", [&] {
        handle.close();
        EXPECT_TRUE(read);
        group.done();
      });
      base::io::sleep_for(milliseconds(10));
    }
    group.wait();
  });
}

TEST_F(GraphTest, PointingAHandleWhereItPointsAlreadyKeepsItAUser) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=4K,node-name=a"));
    Handle handle = graph_.attach("a", "tester", Permissions::front_end(true));
    {
      const Graph::Drain drain(graph_, milliseconds(100));
      graph_.replace_node(handle, "a");
    }
    EXPECT_EQ(error_number([&] { graph_.remove("a"); }), EBUSY);
    handle.close();
  });
}

TEST_F(GraphTest, ADrainWaitsForRequestsAndHoldsNewOnesBack) {
  std::atomic<int> begun{0}, done{0};
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=null,size=1M,latency-ns=100000000,node-name=slow"));
    Handle handle = graph_.attach("slow", "tester", Permissions::front_end(true));
    base::WaitGroup group;
    const auto start_read = [&] {
      group.add();
      loops_.loop(1).post("reader", [&] {
        std::byte buffer[512];
        ++begun;
        handle.read(0, SingleBuffer(buffer, sizeof buffer));
        ++done;
        group.done();
      });
    };
    const auto in_flight = [&] { return graph_.users().at(0).in_flight; };
    start_read();
    while (in_flight() == 0) base::io::sleep_for(milliseconds(1));
    {
      const Graph::Drain drain(graph_, std::chrono::seconds(20));
      EXPECT_EQ(in_flight(), 0U);  // it was waited for
      start_read();
      while (begun == 1) base::io::sleep_for(milliseconds(1));
      base::io::sleep_for(milliseconds(150));
      EXPECT_EQ(done, 1);  // the new one waits
    }
    group.wait();
    EXPECT_EQ(done, 2);
    handle.close();
  });
}

TEST_F(GraphTest, ADrainThatCannotEndNamesWhatIsStuckAndLetsGo) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=null,size=1M,latency-ns=200000000,node-name=slow"));
    Handle handle = graph_.attach("slow", "sleepy client", Permissions::front_end(true));
    base::WaitGroup group;
    group.add();
    std::atomic<bool> reading{false};
    loops_.loop(1).post("reader", [&] {
      std::byte buffer[512];
      reading = true;
      handle.read(0, SingleBuffer(buffer, sizeof buffer));
      group.done();
    });
    do {
      base::io::sleep_for(milliseconds(10));
    } while (!reading);
    const std::string text =
        error_text([&] { const Graph::Drain drain(graph_, milliseconds(20)); });
    EXPECT_NE(text.find("sleepy client has 1 requests"), std::string::npos) << text;
    group.wait();
    handle.flush();
    handle.close();
  });
}

TEST_F(GraphTest, AHandleCanBePointedElsewhereUnderADrain) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=4K,node-name=a"));
    graph_.add(Options::from_keys("driver=memory,size=8K,node-name=b"));
    Handle handle = graph_.attach("a", "tester", Permissions::front_end(true));
    {
      const Graph::Drain drain(graph_, milliseconds(100));
      graph_.replace_node(handle, "b");
    }
    EXPECT_EQ(handle.size(), 8192U);
    graph_.remove("a");
    handle.close();
  });
}

TEST_F(GraphTest, AHandleDestroyedUnclosedIsReaped) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=4K,node-name=m"));
    {
      Handle handle = graph_.attach("m", "careless", Permissions::front_end(true));
      char c = 1;
      handle.write(0, SingleBuffer(&c, 1));
    }
    graph_.close();  // waits for the reaper; would throw EBUSY if the user were still there
  });
}

TEST_F(GraphTest, RequestsGoThroughHundredsOfLayersOnAFreshStackWhereOneIsUsedUp) {
  on_fiber([&] {
    // raw on raw on ... on memory, each by reference to the one before.
    graph_.add(Options::from_keys("driver=memory,size=64K,node-name=n0"));
    for (size_t i = 1; i <= 600; ++i) {
      graph_.add(Options::from_keys("driver=raw,node-name=n" + std::to_string(i) + ",file=n" +
                                    std::to_string(i - 1)));
    }
    Handle handle = graph_.attach("n600", "tester", Permissions::front_end(true));
    char text[] = "down and up again";
    handle.write(5, SingleBuffer(text, sizeof text));
    char got[sizeof text];
    handle.read(5, SingleBuffer(got, sizeof got));
    EXPECT_STREQ(got, text);
    EXPECT_TRUE(handle.block_status(0, 100).data);
    handle.flush();
    handle.prefetch(0, 4096);
    handle.write_zeroes(5, 4);
    handle.read(5, SingleBuffer(got, sizeof got));
    EXPECT_EQ(std::string(got, 8), std::string("\0\0\0\0 and", 8));
    handle.discard(0, 65536);
    handle.truncate(32768);
    handle.close();
  });
}

TEST_F(GraphTest, WriteThroughMakesEveryFrontEndWriteDurable) {
  on_fiber([&] {
    class FuaNode final : public Node {
     public:
      FuaNode() : Node("f", "test", false) { set_size(4096); }
      int fua = 0;
      void driver_read(uint64_t, IoSpan) override {}
      void driver_write(uint64_t, IoSpan, WriteFlags flags) override { fua += flags.fua; }
      void driver_flush() override {}
    };
    auto node = std::make_shared<FuaNode>();
    char c = 0;
    Edge root(node, "r", Permissions::front_end(true), EdgeKind::kRoot);
    root.write(0, SingleBuffer(&c, 1));
    EXPECT_EQ(node->fua, 0);
    node->set_write_through(true);
    root.write(0, SingleBuffer(&c, 1));
    EXPECT_EQ(node->fua, 1);
  });
}

// It may wait for what a node says, which others do not care about.
TEST_F(GraphTest, WhoLooksHoldsUpOnlyWhoClosesOrDrains) {
  base::Event go_on;
  std::atomic<bool> removed{false};
  base::WaitGroup group;
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=1M,node-name=seen"));
    base::Event looking;
    group.add(2);
    loops_.loop(1).post("looker", [&] {
      int seen = 0;
      graph_.look([&](Node& node) {
        ++seen;
        looking.set();
        go_on.wait();
        EXPECT_EQ(node.name(), "seen");
        EXPECT_FALSE(removed);
      });
      EXPECT_EQ(seen, 1);
      group.done();
    });
    looking.wait();
    int seen = 0;
    graph_.look([&](Node&) { ++seen; });
    EXPECT_EQ(seen, 1);
    graph_.add(Options::from_keys("driver=memory,size=1M,node-name=other"));
    graph_.attach("other", "tester", Permissions::front_end(true)).close();
    graph_.remove("other");
    EXPECT_NE(error_text([&] { const Graph::Drain drain(graph_, milliseconds(20)); }).find("look"),
              std::string::npos);
    loops_.loop(0).spawn("remover", [&] {
      graph_.remove("seen");  // is not "in use"
      removed = true;
      group.done();
    });
    base::io::sleep_for(milliseconds(10));
    graph_.look([](Node& node) { ADD_FAILURE() << node.name(); });
    go_on.set();
    group.wait();
    const Graph::Drain drain(graph_, milliseconds(10'000));
  });
  EXPECT_TRUE(removed);
}

// Sanitizers need address space of their own at any time.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// Each node is closed by a fiber, for which there may be no memory.
TEST(GraphClose, EndsWithoutMemoryForFibers) {
  const auto close_without_room = [] {
    base::EventLoop loop;
    loop.post("test", [&loop] {
      Graph graph;
      constexpr int kNodes = 200;
      for (int i = 0; i < kNodes; ++i) {
        graph.add(
            Options::from_keys("driver=raw,file.driver=null,node-name=n" + std::to_string(i)));
      }
      const rlimit none{0, 0};
      if (::setrlimit(RLIMIT_AS, &none) != 0) std::_Exit(2);
      graph.close();
      if (!graph.describe().empty()) std::_Exit(3);
      loop.stop();
    });
    loop.run();
    std::_Exit(0);
  };
  EXPECT_EXIT(close_without_room(), testing::ExitedWithCode(0), "");
}
#endif

}  // namespace
}  // namespace minivmm::block
