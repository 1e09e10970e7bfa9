// SPDX-License-Identifier: Apache-2.0
// The node `nbd` and the time in which a server is not there: what waits for it, and what does not.
#include <unistd.h>

#include <chrono>
#include <future>
#include <mutex>
#include <semaphore>
#include <variant>
#include <vector>

#include "block/graph/root.h"
#include "fixture.h"
#include "hostile_server.h"

namespace minivmm::nbd {
namespace {

using Peer = HostilePeer;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr uint16_t kWrite = 1, kDisconnect = 2, kFlush = 3;
constexpr uint16_t kManyConnections = 0x10d;  // FLUSH and FUA, too

class Reconnect : public ServerTest {
 protected:
  Reconnect() : path_(testing::TempDir() + "nbd_reconnect_" + std::to_string(::getpid())) {}
  std::string keys(const std::string& name, const std::string& more = {}) const {
    return "driver=nbd,node-name=" + name + ",uri=nbd+unix:///?socket=" + path_ + more;
  }
  uint64_t connections() {
    return on_fiber([&] {
      for (const auto& [name, value] : graph_.find("remote")->facts()) {
        if (name == "connections") return std::get<uint64_t>(value);
      }
      return uint64_t{0};
    });
  }
  const std::string path_;
};

// A connection breaks, and on another one lies an answer that its loop has not come to yet. What it
// acknowledges was not flushed: the new server has to be told of it before anything else.
TEST_F(Reconnect, NothingIsSentAgainBeforeTheOldConnectionsHaveEnded) {
  std::binary_semaphore written{0}, answer{0}, answered{0}, hang_up{0}, release{0};
  std::atomic<bool> released{false}, too_early{false};
  std::mutex mutex;
  std::vector<uint16_t> seen;  // by the new server
  HostileServer server(path_, [&](Peer& peer) {
    if (peer.number() >= 2 && !released) too_early = true;
    peer.enter({.flags = kManyConnections});
    if (peer.number() == 0) {
      for (int i = 0; i < 2; ++i) {
        const Peer::Request asked = peer.request();
        peer.chunk(asked, 1, join({be64(asked.offset), Bytes(asked.length)}));
      }
      (void)hang_up.try_acquire_for(seconds(10));
      return;
    }
    for (;;) {
      const Peer::Request asked = peer.request();
      if (asked.type == kDisconnect) return;
      if (peer.number() == 1) {
        written.release();
        (void)answer.try_acquire_for(seconds(10));
      } else {
        const std::lock_guard lock(mutex);
        seen.push_back(asked.type);
      }
      peer.simple(asked);
      if (peer.number() == 1) answered.release();
    }
  });
  block::Handle disk = on_fiber([&] {
    (void)graph_.add(
        block::Options::from_keys(keys("remote", ",connections=2,reconnect-delay=20")));
    return graph_.attach("remote", "the test", block::Permissions::front_end(true));
  });
  Bytes data(4096);
  const auto use = [&](unsigned loop, auto&& what) { loops_.loop(loop).call("use", what); };
  for (const unsigned loop : {0u, 1u}) {
    use(loop, [&] { disk.read(0, base::SingleBuffer(data.data(), data.size())); });
  }
  // The second loop's own connection is made in the background.
  const auto limit = base::Clock::now() + seconds(10);
  while (connections() < 2 && base::Clock::now() < limit) ::usleep(1000);
  auto write = std::async(std::launch::async, [&] {
    use(1, [&] { disk.write(8192, base::SingleBuffer(data.data(), data.size())); });
  });
  ASSERT_TRUE(written.try_acquire_for(seconds(10)));
  loops_.loop(1).post("busy", [&] { (void)release.try_acquire_for(seconds(10)); });
  answer.release();
  ASSERT_TRUE(answered.try_acquire_for(seconds(10)));
  hang_up.release();
  ::usleep(200'000);
  released = true;
  release.release();
  write.get();
  on_fiber([&] { disk.flush(); });
  EXPECT_FALSE(too_early) << "the new connection was made before the old one had ended";
  {
    const std::lock_guard lock(mutex);
    EXPECT_EQ(seen, (std::vector<uint16_t>{kWrite, kFlush}));
  }
  on_fiber([&] {
    disk.close();
    graph_.remove("remote");
  });
}

// Whoever looks at the graph, or opens something else, does not wait for a server that says
// nothing.
TEST_F(Reconnect, OpeningANodeOnASilentServerHoldsUpNobodyElse) {
  std::binary_semaphore there{0}, enough{0};
  HostileServer server(path_, [&](Peer&) {
    there.release();
    (void)enough.try_acquire_for(seconds(10));
  });
  auto opening = std::async(std::launch::async, [&] {
    return error_number([&] {
      on_fiber([&] {
        (void)graph_.add(block::Options::from_keys(
            "driver=raw,node-name=top,file.driver=nbd,file.uri=nbd+unix:///?socket=" + path_));
      });
    });
  });
  ASSERT_TRUE(there.try_acquire_for(seconds(10)));
  const auto begin = base::Clock::now();
  on_fiber([&] {
    (void)graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=other"));
    block::Handle other = graph_.attach("other", "the test", block::Permissions::front_end(true));
    int seen = 0;
    graph_.look([&](block::Node&) { ++seen; });
    EXPECT_EQ(seen, 1);
    other.close();
    graph_.remove("other");
  });
  EXPECT_LT(base::Clock::now() - begin, seconds(5));
  EXPECT_EQ(opening.wait_for(milliseconds(0)), std::future_status::timeout);
  enough.release();
  EXPECT_NE(opening.get(), 0);
  on_fiber([&] { graph_.look([](block::Node& node) { ADD_FAILURE() << node.name(); }); });
}

// What was connected for a node that cannot be is let go of, and where that can be seen before,
// nothing is connected.
TEST_F(Reconnect, AConnectionForANodeThatCannotBeIsClosed) {
  std::atomic<unsigned> left{0};
  HostileServer server(path_, [&](Peer& peer) {
    peer.enter({.flags = 1});
    EXPECT_EQ(peer.request().type, kDisconnect);
    ++left;
  });
  on_fiber([&] {
    (void)graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=taken"));
  });
  const std::string file = ",file.driver=nbd,file.uri=nbd+unix:///?socket=" + path_;
  const auto expect_refused = [&](const std::string& keys, unsigned connections) {
    EXPECT_NE(
        error_number([&] { on_fiber([&] { (void)graph_.add(block::Options::from_keys(keys)); }); }),
        0)
        << keys;
    const auto limit = base::Clock::now() + seconds(10);
    while (left != connections && base::Clock::now() < limit) ::usleep(1000);
    EXPECT_EQ(left, connections) << keys;
    EXPECT_EQ(server.connections(), connections) << keys;
  };
  expect_refused("driver=raw,node-name=top" + file + ",file.nonsense=1", 1);
  expect_refused("driver=raw,node-name=top,nonsense=1" + file, 2);
  expect_refused("driver=raw,node-name=top" + file + ",size=2M", 3);
  for (const char* keys :
       {"driver=nosuch", "driver=raw,node-name=taken",
        "driver=raw,node-name=top,file.node-name=taken", "driver=null,node-name=top"}) {
    expect_refused(keys + file, 3);
  }
}

}  // namespace
}  // namespace minivmm::nbd
