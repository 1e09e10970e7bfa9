// SPDX-License-Identifier: Apache-2.0
// Drains of a node: what can come to it stands still, and nothing else does.
#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "base/io.h"
#include "base/sync.h"
#include "block/graph/graph.h"
#include "tests/unit/block/graph_fixture.h"

namespace minivmm::block {
namespace {

using base::SingleBuffer;
using std::chrono::milliseconds;

// Reads whatever it stands on, and counts who is inside.
class Joint : public Node {
 public:
  Joint(std::string name, const std::vector<std::shared_ptr<Node>>& below)
      : Node(std::move(name), "joint", false) {
    set_size(1 << 20);
    for (const auto& each : below) {
      edges_.push_back(std::make_unique<Edge>(each, "joint above", Permissions::observer()));
    }
  }
  std::vector<Edge*> children() override {
    std::vector<Edge*> out;
    for (const auto& edge : edges_) out.push_back(edge.get());
    return out;
  }
  void driver_read(uint64_t offset, IoSpan to) override {
    ++inside;
    if (stuck) go_on.wait();
    for (const auto& edge : edges_) edge->read(offset, to);
    ++reads;
    --inside;
  }
  void driver_write(uint64_t, IoSpan, WriteFlags) override {}
  void driver_flush() override {
    ++flushes;
    if (stuck) go_on.wait();
  }
  void close() override {
    closing_now = true;
    if (stuck) go_on.wait();
  }

  std::atomic<int> inside{0};
  std::atomic<uint64_t> reads{0};
  std::atomic<int> flushes{0};
  std::atomic<bool> stuck{false};
  std::atomic<bool> closing_now{false};
  base::Event go_on;

 private:
  std::vector<std::unique_ptr<Edge>> edges_;
};

class DrainTest : public GraphTest {
 protected:
  std::shared_ptr<Joint> joint(const std::string& name,
                               const std::vector<std::shared_ptr<Node>>& below = {}) {
    auto out = std::make_shared<Joint>(name, below);
    graph_.adopt(out);
    return out;
  }
  Handle attach(const std::string& node) {
    return graph_.attach(node, "user of " + node, Permissions::front_end(false));
  }
  static void read(Handle& handle) {
    std::byte buffer[512];
    handle.read(0, SingleBuffer(buffer, sizeof buffer));
  }
  void start_read(Handle& handle, base::WaitGroup& group, std::atomic<bool>* done = nullptr) {
    group.add();
    loops_.loop(1).post("reader", [&handle, &group, done] {
      read(handle);
      if (done != nullptr) *done = true;
      group.done();
    });
  }
  template <typename Condition>
  static void wait_for(Condition condition) {
    while (!condition()) base::io::sleep_for(milliseconds(1));
  }
};

// A node that does not answer is no matter of a drain of another one.
TEST_F(DrainTest, WhatHangsElsewhereIsNotWaitedFor) {
  on_fiber([&] {
    const auto hung = joint("hung");
    const auto a = joint("a");
    hung->stuck = true;
    Handle of_hung = attach("hung");
    Handle of_a = attach("a");
    base::WaitGroup group;
    start_read(of_hung, group);
    wait_for([&] { return hung->inside == 1; });
    { const Graph::Drain drain(graph_, *a, std::chrono::seconds(60)); }
    EXPECT_EQ(error_number([&] { const Graph::Drain drain(graph_, *hung, milliseconds(20)); }),
              ETIMEDOUT);
    EXPECT_EQ(error_number([&] { const Graph::Drain drain(graph_, milliseconds(20)); }), ETIMEDOUT);
    hung->go_on.set();
    group.wait();
    { const Graph::Drain drain(graph_, *hung, std::chrono::seconds(60)); }
    of_hung.close();
    of_a.close();
  });
}

// Whatever a drain waits for, other trees are used, and their users come and go; so do nodes.
TEST_F(DrainTest, OthersGoOnMeanwhile) {
  on_fiber([&] {
    const auto hung = joint("hung");
    hung->stuck = true;
    const auto a = joint("a");
    Handle of_hung = attach("hung");
    base::WaitGroup group;
    start_read(of_hung, group);
    wait_for([&] { return hung->inside == 1; });
    group.add();
    std::atomic<bool> drained{false};
    loops_.loop(1).post("drainer", [&] {
      const Graph::Drain drain(graph_, *hung, std::chrono::seconds(60));
      drained = true;
      group.done();
    });
    std::atomic<bool> held_back{false};
    base::io::sleep_for(milliseconds(10));
    start_read(of_hung, group, &held_back);
    Handle of_a = attach("a");
    read(of_a);
    { const Graph::Drain other(graph_, *a, std::chrono::seconds(60)); }
    of_a.close();
    graph_.add(Options::from_keys("driver=memory,size=1M,node-name=m"));
    graph_.add(Options::from_keys("driver=raw,file=m,node-name=above"));
    graph_.remove("above");
    graph_.remove("m");
    EXPECT_FALSE(drained);
    EXPECT_FALSE(held_back);
    hung->go_on.set();
    group.wait();
    EXPECT_TRUE(held_back);
    of_hung.close();
  });
}

// Who would begin to use what is drained, or end it, waits for that.
TEST_F(DrainTest, NobodyComesToADrainedNodeOrLeavesIt) {
  on_fiber([&] {
    const auto below = joint("below");
    const auto above = joint("above", {below});
    (void)joint("unused", {below});
    Handle leaves = attach("above");
    base::WaitGroup group;
    std::atomic<int> ended{0};
    const auto start = [&](std::function<void()> what) {
      group.add();
      loops_.loop(1).post("other", [&, what = std::move(what)] {
        what();
        ++ended;
        group.done();
      });
    };
    {
      const Graph::Drain drain(graph_, *below, std::chrono::seconds(60));
      start([&] { attach("below").close(); });
      start([&] { attach("above").close(); });
      start([&] { leaves.close(); });
      start([&] { graph_.remove("unused"); });
      start([&] { (void)joint("new", {above}); });
      start([&] {
        graph_.add(Options::from_keys("driver=raw,file=above,node-name=top,read-only=on"));
        graph_.remove("top");
      });
      start([&] { const Graph::Drain again(graph_, *above, std::chrono::seconds(60)); });
      start([&] { graph_.look([](Node&) {}); });
      // Of those that do not wait some would have ended by now.
      base::io::sleep_for(milliseconds(100));
      EXPECT_EQ(ended, 0);
    }
    group.wait();
    EXPECT_EQ(ended, 8);
    graph_.remove("new");
  });
}

TEST_F(DrainTest, WaitsForWhoClosesOrLooksAtWhatReachesTheNode) {
  on_fiber([&] {
    const auto below = joint("below");
    const auto above = joint("above", {below});
    const auto other = joint("other");
    above->stuck = true;
    base::WaitGroup group;
    group.add();
    const auto drain = [&](Node& node) {
      return error_text([&] { const Graph::Drain held(graph_, node, milliseconds(20)); });
    };
    Joint& closed = *above;
    loops_.loop(1).post("remover", [&] {
      graph_.remove("above");
      group.done();
    });
    wait_for([&] { return closed.closing_now.load(); });
    EXPECT_NE(drain(*below).find("closing it"), std::string::npos);
    EXPECT_EQ(drain(*other), "");
    closed.go_on.set();
    group.wait();
    EXPECT_EQ(drain(*below), "");

    base::Event seen, enough;
    group.add();
    loops_.loop(1).post("looker", [&] {
      graph_.look([&](Node& node) {
        if (&node != below.get()) return;
        seen.set();
        enough.wait();
      });
      group.done();
    });
    seen.wait();
    EXPECT_NE(drain(*below).find("a look"), std::string::npos);
    EXPECT_EQ(drain(*other), "");
    enough.set();
    group.wait();
  });
}

// The flush of a handle that is closed is a request as any other.
TEST_F(DrainTest, WaitsForLastFlushesAndHoldsThemBack) {
  on_fiber([&] {
    const auto node = joint("node");
    base::WaitGroup group;
    const auto write_and_close = [&] {
      group.add();
      loops_.loop(1).post("writer", [&] {
        Handle writer = graph_.attach("node", "writer", Permissions::front_end(true));
        std::byte buffer[512] = {};
        writer.write(0, SingleBuffer(buffer, sizeof buffer));
        writer.close();
        group.done();
      });
    };
    node->stuck = true;
    write_and_close();
    wait_for([&] { return node->flushes == 1; });
    EXPECT_EQ(error_number([&] { const Graph::Drain drain(graph_, *node, milliseconds(20)); }),
              ETIMEDOUT);
    node->go_on.set();
    group.wait();
    Handle writer = graph_.attach("node", "writer", Permissions::front_end(true));
    std::byte buffer[512] = {};
    writer.write(0, SingleBuffer(buffer, sizeof buffer));
    {
      const Graph::Drain drain(graph_, *node, std::chrono::seconds(60));
      group.add();
      loops_.loop(1).post("closer", [&] {
        writer.close();
        group.done();
      });
      base::io::sleep_for(milliseconds(50));
      EXPECT_EQ(node->flushes, 1);
    }
    group.wait();
    EXPECT_EQ(node->flushes, 2);
  });
}

// Any graph, against what the edges say: during a drain nothing is inside the node, and those that
// cannot come to it go on.
TEST_F(DrainTest, IsOfWhatReachesTheNode) {
  const auto seed = static_cast<unsigned>(std::random_device()());
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  const auto pick = [&](size_t n) { return static_cast<size_t>(random() % n); };
  constexpr size_t kNodes = 12;
  on_fiber([&] {
    std::vector<std::shared_ptr<Joint>> nodes;
    std::vector<std::set<size_t>> reaches;  // by each, itself among them
    for (size_t i = 0; i < kNodes; ++i) {
      std::vector<std::shared_ptr<Node>> below;
      reaches.push_back({i});
      for (size_t n = pick(3); n > 0 && i > 0; --n) {
        const size_t child = pick(i);
        below.push_back(nodes[child]);
        reaches[i].insert(reaches[child].begin(), reaches[child].end());
      }
      nodes.push_back(joint("n" + std::to_string(i), below));
    }
    std::atomic<bool> stop{false};
    std::vector<std::unique_ptr<std::atomic<uint64_t>>> progress;
    std::vector<Handle> handles;
    for (size_t i = 0; i < kNodes; ++i) {
      handles.push_back(attach("n" + std::to_string(i)));
      progress.push_back(std::make_unique<std::atomic<uint64_t>>(0));
    }
    base::WaitGroup group;
    for (size_t i = 0; i < kNodes; ++i) {
      group.add();
      loops_.loop(static_cast<unsigned>(i % 2)).post("reader", [&, i] {
        while (!stop) {
          read(handles[i]);
          ++*progress[i];
          base::io::sleep_for(std::chrono::microseconds(50));
        }
        group.done();
      });
    }
    // Others come and go.
    group.add();
    loops_.loop(1).post("comer", [&] {
      for (size_t i = 0; !stop; i = (i + 5) % kNodes) {
        Handle mine = attach("n" + std::to_string(i));
        read(mine);
        mine.close();
      }
      group.done();
    });
    for (int turn = 0; turn < 40; ++turn) {
      const size_t drained = pick(kNodes);
      const Graph::Drain drain(graph_, *nodes[drained], std::chrono::seconds(60));
      EXPECT_EQ(nodes[drained]->inside, 0);
      const uint64_t before = nodes[drained]->reads;
      for (size_t i = 0; i < kNodes; ++i) {
        const uint64_t had = *progress[i];
        if (reaches[i].contains(drained)) continue;
        wait_for([&] { return *progress[i] > had; });
      }
      EXPECT_EQ(nodes[drained]->inside, 0);
      EXPECT_EQ(nodes[drained]->reads, before);
    }
    stop = true;
    group.wait();
    for (Handle& handle : handles) handle.close();
  });
}

}  // namespace
}  // namespace minivmm::block
