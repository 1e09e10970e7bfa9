// SPDX-License-Identifier: Apache-2.0
// A disk is being opened on an NBD server that lets us in and then answers nothing: nobody else
// waits for that, and it can be given up.
#include <string>
#include <unistd.h>

#include <chrono>
#include <functional>
#include <future>
#include <semaphore>
#include <vector>

#include "base/io.h"
#include "fixture.h"
#include "hostile_server.h"

namespace minivmm::nbd {
namespace {

using block::Options;
using block::Permissions;
using Peer = HostilePeer;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr uint16_t kRead = 0;

class ClientOpen : public ServerTest {
 protected:
  ClientOpen() : path_(testing::TempDir() + "nbd_open_" + std::to_string(::getpid())) {}
  ~ClientOpen() override {
    // Before the graph, which waits for what is being opened.
    answer_.release(8);
  }

  std::string error_of(const std::string& keys) {
    try {
      on_fiber([&] { graph_.add(Options::from_keys(keys)); });
    } catch (const base::Error& e) {
      return e.what();
    }
    return {};
  }
  // Adds it on another loop. Ends with what went wrong.
  std::future<std::string> begin(const std::string& keys) {
    auto promise = std::make_shared<std::promise<std::string>>();
    loops_.loop(1).post("add", [this, promise, keys] {
      std::string error;
      try {
        graph_.add(Options::from_keys(keys));
      } catch (const base::Error& e) {
        error = e.what();
      }
      promise->set_value(error);
    });
    return promise->get_future();
  }
  // qcow2 reads its header first.
  std::future<std::string> begin_far(const std::string& more = "") {
    auto out = begin("driver=qcow2,node-name=far,file.driver=nbd,file.path=" + path_ + more);
    asked_.acquire();
    return out;
  }
  static bool waits(std::future<std::string>& adding) {
    return adding.wait_for(seconds(0)) == std::future_status::timeout;
  }
  void expect_nothing_left(const std::vector<std::string>& expected) {
    std::vector<std::string> names;
    on_fiber([&] { graph_.look([&](block::Node& each) { names.push_back(each.name()); }); });
    EXPECT_EQ(names, expected);
  }

  const std::string path_;
  std::counting_semaphore<> asked_{0};   // a READ has come
  std::counting_semaphore<> answer_{0};  // one may be answered
  HostileServer server_side_{path_, [this](Peer& peer) {
                               peer.enter({.structured = false, .contexts = false});
                               peer.answer_all(kRead, [&](const Peer::Request& request) {
                                 asked_.release();
                                 answer_.acquire();
                                 peer.simple(request, 0, Bytes(request.length));
                               });
                             }};
};

TEST_F(ClientOpen, HoldsUpNobodyElse) {
  auto adding = begin_far();
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=1M,node-name=m"));
    block::Handle handle = graph_.attach("m", "tester", Permissions::front_end(true));
    { const block::Graph::Drain drain(graph_, seconds(10)); }
    int seen = 0;
    graph_.look([&](block::Node&) { ++seen; });
    EXPECT_EQ(seen, 1);
    handle.close();
    graph_.remove("m");
    // Nobody finds what is not complete.
    EXPECT_EQ(error_number([&] { (void)graph_.find("far"); }), ENOENT);
    EXPECT_EQ(error_number([&] { (void)graph_.find("far.file"); }), ENOENT);
  });
  EXPECT_TRUE(waits(adding));
  answer_.release(8);
  EXPECT_NE(adding.get().find("qcow2"), std::string::npos);  // zeroes are none
  expect_nothing_left({});
}

TEST_F(ClientOpen, HasItsNamesFromTheStart) {
  auto adding = begin_far();
  EXPECT_NE(error_of("driver=null,node-name=far").find("that is being opened"), std::string::npos);
  EXPECT_NE(error_of("driver=null,node-name=far.file").find("which is being opened"),
            std::string::npos);
  answer_.release(8);
  (void)adding.get();
  EXPECT_EQ(error_of("driver=null,node-name=far"), "");
}

TEST_F(ClientOpen, KeepsWhatItRefersToAsItIs) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=nbd,node-name=wire,path=" + path_));
    block::Handle reader = graph_.attach("wire", "reader", Permissions::front_end(false));
    reader.close();
  });
  auto adding = begin("driver=qcow2,node-name=top,file=wire");
  asked_.acquire();
  EXPECT_EQ(error_number([&] { on_fiber([&] { graph_.remove("wire"); }); }), EBUSY);
  EXPECT_NE(error_of("driver=raw,node-name=other,file=wire").find("the opening of 'top'"),
            std::string::npos);
  on_fiber([&] {
    EXPECT_EQ(error_number([&] { (void)graph_.attach("wire", "w", Permissions::front_end(true)); }),
              EBUSY);
    EXPECT_EQ(error_number([&] { const block::Graph::Drain drain(graph_, milliseconds(20)); }),
              ETIMEDOUT);
  });
  EXPECT_TRUE(waits(adding));
  answer_.release(8);
  EXPECT_NE(adding.get(), "");
  on_fiber([&] {
    { const block::Graph::Drain drain(graph_, seconds(10)); }
    block::Handle writer = graph_.attach("wire", "w", Permissions::front_end(true));
    writer.close();
    graph_.remove("wire");
  });
  expect_nothing_left({});
}

// Before it begins, too: what it would find on disk may not be all there is.
TEST_F(ClientOpen, DoesNotBeginOverAWriter) {
  on_fiber([&] {
    graph_.add(Options::from_keys("driver=memory,size=1M,node-name=m"));
    block::Handle writer = graph_.attach("m", "guest", Permissions::front_end(true));
    EXPECT_EQ(
        error_number([&] { graph_.add(Options::from_keys("driver=qcow2,file=m,read-only=on")); }),
        EBUSY);
    writer.close();
  });
}

TEST_F(ClientOpen, IsGivenUpByDeletingIt) {
  auto adding = begin_far();
  on_fiber([&] {
    EXPECT_FALSE(graph_.give_up_opening("far.file"));
    EXPECT_TRUE(graph_.give_up_opening("far"));
    EXPECT_FALSE(graph_.give_up_opening("far"));
  });
  EXPECT_NE(adding.get().find("'far' was given up: the node was deleted"), std::string::npos);
  expect_nothing_left({});
  EXPECT_EQ(error_of("driver=null,node-name=far"), "");
}

TEST_F(ClientOpen, IsGivenUpWhenAllIsClosed) {
  auto adding = begin_far();
  on_fiber([&] { graph_.close(); });
  EXPECT_NE(adding.get().find("'far' was given up: all nodes are being closed"), std::string::npos);
  EXPECT_NE(error_of("driver=null,node-name=late").find("any more"), std::string::npos);
}

// Nothing listens: it would be tried for an hour.
TEST_F(ClientOpen, IsGivenUpWhileItConnects) {
  auto adding = begin("driver=nbd,node-name=far,open-timeout=3600,path=" + path_ + ".not");
  on_fiber([&] {
    while (!graph_.give_up_opening("far")) base::io::sleep_for(milliseconds(1));
  });
  EXPECT_NE(adding.get().find("given up"), std::string::npos);
}

// On two loops, with a common base that each refers to.
TEST_F(ClientOpen, ManyAtOnce) {
  on_fiber([&] { graph_.add(Options::from_keys("driver=memory,size=1M,node-name=base")); });
  auto far = begin_far();
  base::WaitGroup group;
  std::atomic<int> failures{0};
  constexpr int kEach = 50;
  group.add(2);
  for (size_t loop = 0; loop < 2; ++loop) {
    loops_.loop(loop).post("adder", [&, loop] {
      for (int i = 0; i < kEach; ++i) {
        const std::string name = "n" + std::to_string(loop) + "." + std::to_string(i);
        try {
          graph_.add(Options::from_keys("driver=raw,read-only=on,file=base,node-name=" + name));
          graph_.add(
              Options::from_keys("driver=raw,file.driver=memory,file.size=1M,node-name=w" + name));
          graph_.remove("w" + name);
          graph_.remove(name);
        } catch (const base::Error&) {
          ++failures;
        }
      }
      group.done();
    });
  }
  on_fiber([&] { group.wait(); });
  EXPECT_EQ(failures, 0);
  EXPECT_TRUE(waits(far));
  answer_.release(8);
  (void)far.get();
}

}  // namespace
}  // namespace minivmm::nbd
