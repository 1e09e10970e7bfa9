// SPDX-License-Identifier: Apache-2.0
// The end of a node `nbd` whose server does not answer any more: it comes, nobody else waits for
// it, and it is told what may be lost.
#include <unistd.h>

#include <chrono>
#include <functional>
#include <future>
#include <mutex>
#include <semaphore>
#include <vector>

#include "base/io.h"
#include "block/protocols/nbd/nbd_node.h"
#include "fixture.h"
#include "hostile_server.h"

namespace minivmm::nbd {
namespace {

using Peer = HostilePeer;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr uint16_t kWrite = 1, kDisconnect = 2;
constexpr auto kPatience = milliseconds(200);

// Writes are done, and nothing else is answered; the connection stays.
void do_writes_only(Peer& peer) {
  peer.enter();
  for (;;) {
    const Peer::Request asked = peer.request();
    if (asked.type == kWrite) peer.simple(asked);
  }
}

// A server that keeps a connection also when its client has taken leave.
class Sticky {
 public:
  Sticky(const std::string& path, std::function<void(Peer&)> talk)
      : server_(path, [this, talk = std::move(talk)](Peer& peer) {
          try {
            talk(peer);
          } catch (const Peer::Gone&) {
            (void)over_.wait_for(seconds(20));
          }
        }) {}
  ~Sticky() { end_.set_value(); }

 private:
  std::promise<void> end_;
  std::shared_future<void> over_{end_.get_future()};
  HostileServer server_;
};

class ClientEnd : public ServerTest {
 protected:
  ClientEnd() : path_(testing::TempDir() + "nbd_end_" + std::to_string(::getpid())) {}

  void open(const std::string& name, seconds reconnect_delay = seconds(0),
            milliseconds patience = kPatience) {
    on_fiber([&] {
      block::NbdTarget target;
      target.uri.socket_path = path_;
      target.closing_timeout = patience;
      target.reconnect_delay = reconnect_delay;
      auto pool = std::make_shared<block::NbdPool>(std::move(target));
      pool->open();
      graph_.adopt(std::make_shared<block::NbdNode>(block::NodeConfig{name, false}, pool));
    });
  }
  block::Handle attach(const std::string& name) {
    return on_fiber(
        [&] { return graph_.attach(name, "the test", block::Permissions::front_end(true)); });
  }
  static void write_on_fiber(block::Handle& disk) {
    Bytes data(4096);
    iovec iov{data.data(), data.size()};
    disk.write(0, block::IoSpan(std::span(&iov, 1)));
  }
  void write(block::Handle& disk) {
    on_fiber([&] { write_on_fiber(disk); });
  }
  // What it throws, as text; empty: nothing.
  template <typename Body>
  std::future<std::string> begin(Body body) {
    return std::async(std::launch::async, [this, body]() -> std::string {
      try {
        on_fiber(body);
      } catch (const base::Error& e) {
        return e.what();
      }
      return {};
    });
  }
  std::future<std::string> remove(const std::string& name) {
    return begin([this, name] { graph_.remove(name); });
  }
  // The same where its handle is about to begin to end.
  std::future<std::string> remove_ended(const std::string& name) {
    return std::async(std::launch::async, [this, name] {
      const auto limit = soon();
      for (;;) {
        std::string out = remove(name).get();
        if (out.find("in use by") == out.npos || base::Clock::now() > limit) return out;
        ::usleep(1000);
      }
    });
  }
  // What others do with the graph.
  void use_the_graph() {
    on_fiber([&] {
      (void)graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=other"));
      block::Handle other = graph_.attach("other", "the test", block::Permissions::front_end(true));
      int seen = 0;
      graph_.look([&](block::Node&) { ++seen; });
      EXPECT_GE(seen, 1);
      other.close();
      graph_.remove("other");
    });
  }
  // Until the node is being closed.
  void wait_until_closing(const std::string& name) {
    const auto limit = soon();
    while (base::Clock::now() < limit) {
      for (const std::string& line : graph_.describe()) {
        if (line.find(name) != line.npos && line.ends_with(": closing")) return;
      }
      ::usleep(1000);
    }
    ADD_FAILURE() << name << " is not being closed";
  }

  const std::string path_;
};

bool running(std::future<std::string>& what) {
  return what.wait_for(milliseconds(0)) == std::future_status::timeout;
}

TEST_F(ClientEnd, DeletingANodeOfASilentServerHoldsUpNobodyAndSaysWhatMayBeLost) {
  const Sticky server(path_, do_writes_only);
  open("remote");
  block::Handle disk = attach("remote");
  write(disk);
  // Its last flush is not answered: without the deletion it would wait for ever.
  auto closing = begin([&] { disk.close(); });
  EXPECT_EQ(closing.wait_for(kPatience / 2), std::future_status::timeout);
  auto removing = remove_ended("remote");
  use_the_graph();
  EXPECT_TRUE(running(removing));
  EXPECT_NE(closing.get(), "");
  const std::string why = removing.get();
  EXPECT_NE(why.find("4096 bytes that the server acknowledged were not flushed"), why.npos) << why;
  EXPECT_EQ(error_number([&] { (void)graph_.find("remote"); }), ENOENT);
  open("remote");
  EXPECT_EQ(remove("remote").get(), "");
}

TEST_F(ClientEnd, ANodeInUseIsNotDeletedBecauseItsServerIsSilent) {
  const Sticky server(path_, do_writes_only);
  open("remote");
  block::Handle disk = attach("remote");
  block::Handle another = attach("remote");
  write(disk);
  auto closing = begin([&] { disk.close(); });
  EXPECT_EQ(closing.wait_for(kPatience / 2), std::future_status::timeout);
  EXPECT_NE(remove("remote").get().find("in use by the test"), std::string::npos);
  write(another);
  EXPECT_TRUE(running(closing));
  auto closing_too = begin([&] { another.close(); });
  EXPECT_EQ(closing_too.wait_for(kPatience / 2), std::future_status::timeout);
  EXPECT_NE(remove_ended("remote").get().find("8192 bytes"), std::string::npos);
  EXPECT_NE(closing.get(), "");
  EXPECT_NE(closing_too.get(), "");
}

// There is nothing that could be lost, and so nothing that could fail.
TEST_F(ClientEnd, WhatWasNotWrittenNeedsNoFlush) {
  std::mutex mutex;
  std::vector<uint16_t> seen;
  const Sticky server(path_, [&](Peer& peer) {
    peer.enter();
    for (;;) {
      const uint16_t type = peer.request().type;
      const std::lock_guard lock(mutex);
      seen.push_back(type);
    }
  });
  open("remote");
  auto removing = remove("remote");
  wait_until_closing("remote");
  use_the_graph();
  EXPECT_TRUE(running(removing));
  // Its name is its own until its connection has ended.
  EXPECT_EQ(error_number([&] {
              on_fiber([&] {
                (void)graph_.add(block::Options::from_keys("driver=null,node-name=remote"));
              });
            }),
            EEXIST);
  EXPECT_EQ(removing.get(), "");
  const std::lock_guard lock(mutex);
  EXPECT_EQ(seen, std::vector<uint16_t>{kDisconnect});
}

TEST_F(ClientEnd, ADrainWaitsForWhatIsBeingClosed) {
  const Sticky server(path_, do_writes_only);
  open("remote");
  auto removing = remove("remote");
  wait_until_closing("remote");
  const auto drain = [&](milliseconds limit) {
    return error_number([&] { on_fiber([&] { block::Graph::Drain held(graph_, limit); }); });
  };
  EXPECT_EQ(drain(kPatience / 8), ETIMEDOUT);
  use_the_graph();
  EXPECT_EQ(drain(seconds(10)), 0);
  for (const std::string& line : graph_.describe()) EXPECT_FALSE(line.ends_with(": closing"));
  EXPECT_EQ(removing.get(), "");
}

TEST_F(ClientEnd, AnOpeningThatFailsHoldsUpNobodyWhileItIsUndone) {
  const Sticky server(path_, do_writes_only);
  auto opening = begin([&] {
    (void)graph_.add(
        block::Options::from_keys("driver=raw,node-name=top,file.driver=nbd,file.nonsense=1,"
                                  "file.request-timeout=1,file.uri=nbd+unix:///?socket=" +
                                  path_));
  });
  wait_until_closing("top.file");
  use_the_graph();
  EXPECT_TRUE(running(opening));
  EXPECT_NE(opening.get().find("unknown option 'nonsense'"), std::string::npos);
}

// The server forgot what it had acknowledged, and takes it again without a word.
TEST_F(ClientEnd, WhatIsDoneAgainIsNotWaitedForForEver) {
  std::binary_semaphore again{0};
  HostileServer server(path_, [&](Peer& peer) {
    peer.enter();
    const Peer::Request asked = peer.request();
    EXPECT_EQ(asked.type, kWrite);
    if (peer.number() == 0) return peer.simple(asked);
    again.release();
    peer.wait_for_end();
  });
  open("remote", seconds(600));
  block::Handle disk = attach("remote");
  write(disk);
  ASSERT_TRUE(again.try_acquire_for(seconds(10)));
  auto closing = begin([&] { disk.close(); });
  const std::string why = remove_ended("remote").get();
  EXPECT_NE(why.find("were not flushed"), why.npos) << why;
  EXPECT_NE(closing.get(), "");
}

// A server that is slow is not given up for it.
TEST_F(ClientEnd, ASlowServerIsWaitedFor) {
  constexpr auto kDelay = milliseconds(150);
  HostileServer server(path_, [&](Peer& peer) {
    peer.enter();
    for (;;) {
      const Peer::Request asked = peer.request();
      if (asked.type == kDisconnect) return;
      ::usleep(static_cast<useconds_t>(kDelay.count() * 1000));
      peer.simple(asked);
    }
  });
  open("remote", seconds(0), 3 * kDelay);
  block::Handle disk = attach("remote");
  // Together they take longer than a silence may.
  std::vector<std::future<std::string>> writing;
  for (int i = 0; i < 3; ++i) writing.push_back(begin([&] { write_on_fiber(disk); }));
  ::usleep(10'000);
  auto closing = begin([&] { disk.close(); });
  EXPECT_EQ(remove_ended("remote").get(), "");
  EXPECT_EQ(closing.get(), "");
  for (auto& each : writing) EXPECT_EQ(each.get(), "");
}

// A node that tells when it is closed.
class Told final : public block::Node {
 public:
  Told(std::string name, std::atomic<bool>& closed)
      : Node(std::move(name), "told", false), closed_(closed) {}
  void close() override { closed_ = true; }

 private:
  void driver_read(uint64_t, block::IoSpan) override {}
  void driver_write(uint64_t, block::IoSpan, block::WriteFlags) override {}
  void driver_flush() override {}
  std::atomic<bool>& closed_;
};

TEST_F(ClientEnd, AtTheEndOfAllNobodyElseIsClosedLater) {
  const Sticky server(path_, do_writes_only);
  std::atomic<bool> closed{false};
  on_fiber([&] { graph_.adopt(std::make_shared<Told>("told", closed)); });
  open("first");
  open("second");
  auto closing = begin([&] { graph_.close(); });
  const auto limit = soon();
  while (!closed && base::Clock::now() < limit) ::usleep(1000);
  EXPECT_TRUE(closed);
  EXPECT_TRUE(running(closing));
  EXPECT_EQ(closing.get(), "");
}

}  // namespace
}  // namespace minivmm::nbd
