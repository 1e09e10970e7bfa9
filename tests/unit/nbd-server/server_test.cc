// SPDX-License-Identifier: Apache-2.0
// The server as a whole: memory, slow readers, many clients, the end.
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <thread>

#include "base/io.h"
#include "fixture.h"
#include "nbd-server/budget.h"

namespace minivmm::nbd {
namespace {

using std::chrono::milliseconds;
constexpr uint16_t kRead = 0, kWrite = 1;

class ServerLife : public ServerTest {
 protected:
  // What was given up at a deadline ends nevertheless, and then lets go of the first node.
  bool node_is_free() {
    const auto node = graph_.find("node1");
    for (int i = 0; i < 1000 && !node->users().empty(); ++i) ::usleep(5000);
    return node->users().empty();
  }
};

TEST_F(ServerLife, ExportsAreCheckedWhenTheyAreAdded) {
  add("disk", "driver=memory,size=1M,read-only=off");
  EXPECT_EQ(error_number([&] { add("disk", "driver=memory,size=1M"); }), EEXIST);
  EXPECT_EQ(error_number([&] { add(std::string(5000, 'x'), "driver=memory,size=1M"); }), EINVAL);
  EXPECT_EQ(error_number([&] { add(std::string("a\0b", 3), "driver=memory,size=1M"); }), EINVAL);
  on_fiber([&] {
    graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=m"));
    block::Handle handle = graph_.attach("m", "test", block::Permissions::front_end(false));
    EXPECT_EQ(error_number([&] {
                server_->add_export("w", std::move(handle), {.description = {}, .writable = true});
              }),
              EROFS);
    // It was taken over and given up: what is left is no handle.
    EXPECT_EQ(error_number([&] { server_->add_export("none", std::move(handle)); }), EINVAL);
  });
}

TEST_F(ServerLife, DescribesItsClients) {
  add("disk", "driver=memory,size=1M");
  Client client = connect();
  client.enter("disk");
  client.read(0, 512);
  const auto lines = server_->describe();
  EXPECT_TRUE(std::any_of(lines.begin(), lines.end(), [](const std::string& line) {
    return line.find("of 'disk': 0 requests in flight, 1 done, 0 errors") != line.npos;
  })) << testing::PrintToString(lines);
}

TEST_F(ServerLife, StopFinishesWhatIsInFlight) {
  add("slow", "driver=null,size=1M,latency-ns=200000000");
  Client client = connect();
  client.enter("slow");
  client.send(client.request(kRead, 1, 0, 512));
  ::usleep(50'000);
  on_fiber([&] {
    EXPECT_TRUE(server_->stop(base::Clock::now() + std::chrono::seconds(10)).empty());
    EXPECT_TRUE(server_->stop(base::Clock::now()).empty());
  });
  EXPECT_EQ(client.simple(512).error, 0u);
  EXPECT_TRUE(client.closed());
  EXPECT_EQ(error_number([&] { add("late", "driver=memory,size=1M"); }), ESHUTDOWN);
}

TEST_F(ServerLife, StopNamesWhatItHadToCutOff) {
  add("slow", "driver=null,size=1M,latency-ns=1500000000");
  Client client = connect();
  client.enter("slow");
  client.send(client.request(kRead, 1, 0, 512));
  ::usleep(50'000);
  on_fiber([&] {
    const auto lines = server_->stop(base::Clock::now() + milliseconds(50));
    ASSERT_EQ(lines.size(), 1u);
    EXPECT_NE(lines[0].find("of 'slow': 1 requests in flight"), std::string::npos) << lines[0];
  });
  EXPECT_TRUE(client.closed());
}

TEST_F(ServerLife, StopDoesNotWaitForAClientThatReadsNothing) {
  add("disk", "driver=memory,size=64M");
  Client client = connect();
  client.enter("disk");
  for (uint64_t i = 0; i < 8; ++i) client.send(client.request(kRead, i, 0, 4 << 20));
  ::usleep(100'000);
  on_fiber([&] {
    const auto begin = base::Clock::now();
    (void)server_->stop(begin + milliseconds(300));
    EXPECT_LT(base::Clock::now() - begin, std::chrono::seconds(3));
  });
}

TEST_F(ServerLife, StopNamesAFlushThatHangs) {
  add("disk", "driver=fault,op=flush,delay-ns=1500000000,file.driver=memory,file.size=1M");
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.error_of(kWrite, 0, 512, 0, Bytes(512)), 0u);
  client.close();
  on_fiber([&] {
    const auto begin = base::Clock::now();
    const auto lines = server_->stop(begin + milliseconds(100));
    EXPECT_LT(base::Clock::now() - begin, milliseconds(1200));
    ASSERT_EQ(lines.size(), 1u);
    EXPECT_NE(lines[0].find("'disk'"), std::string::npos) << lines[0];
    EXPECT_NE(lines[0].find("flushing has not ended"), std::string::npos) << lines[0];
  });
  EXPECT_TRUE(node_is_free());
}

TEST_F(ServerLife, WithdrawingAnExportFinishesWhatIsInFlight) {
  add("slow", "driver=null,size=1M,latency-ns=200000000");
  Client client = connect();
  client.enter("slow");
  client.send(client.request(kRead, 1, 0, 512));
  ::usleep(50'000);
  on_fiber([&] { server_->remove_export("slow", soon()); });
  EXPECT_EQ(client.simple(512).error, 0u);
  EXPECT_TRUE(client.closed());
}

TEST_F(ServerLife, WithdrawingAnExportThatHangsIsGivenUpAtTheDeadline) {
  add("slow", "driver=null,size=1M,latency-ns=1500000000");
  Client client = connect();
  client.enter("slow");
  client.send(client.request(kRead, 1, 0, 512));
  ::usleep(50'000);
  const auto begin = base::Clock::now();
  try {
    on_fiber([&] { server_->remove_export("slow", base::Clock::now() + milliseconds(100)); });
    ADD_FAILURE() << "it is in use";
  } catch (const base::Error& e) {
    EXPECT_EQ(e.err(), ETIMEDOUT);
    EXPECT_NE(std::string(e.what()).find("of 'slow': 1 requests in flight"), std::string::npos)
        << e.what();
  }
  EXPECT_LT(base::Clock::now() - begin, milliseconds(1200));
  EXPECT_TRUE(client.closed());
  // The name is free at once, the node when the request has ended.
  add("slow", "driver=memory,size=1M");
  EXPECT_TRUE(node_is_free());
}

TEST_F(ServerLife, WithdrawingAnExportDoesNotWaitForAClientThatReadsNothing) {
  add("disk", "driver=memory,size=64M");
  Client client = connect();
  client.enter("disk");
  for (uint64_t i = 0; i < 8; ++i) client.send(client.request(kRead, i, 0, 4 << 20));
  ::usleep(100'000);
  const auto begin = base::Clock::now();
  on_fiber([&] { server_->remove_export("disk", begin + milliseconds(300)); });
  EXPECT_LT(base::Clock::now() - begin, std::chrono::seconds(3));
}

TEST_F(ServerLife, WithdrawingAnExportNamesAFlushThatHangs) {
  add("disk", "driver=fault,op=flush,delay-ns=1500000000,file.driver=memory,file.size=1M");
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.error_of(kWrite, 0, 512, 0, Bytes(512)), 0u);
  const auto begin = base::Clock::now();
  EXPECT_EQ(error_number([&] {
              on_fiber([&] { server_->remove_export("disk", begin + milliseconds(100)); });
            }),
            ETIMEDOUT);
  EXPECT_LT(base::Clock::now() - begin, milliseconds(1200));
  EXPECT_TRUE(node_is_free());
}

// Two connections, one on each loop, that never let the server wait.
TEST_F(ServerLife, AClientThatAlwaysHasMoreToSayKeepsNobodyElseFromTheServer) {
  add("disk", "driver=memory,size=1M");
  std::atomic<bool> done{false};
  std::vector<std::thread> threads;
  std::vector<Client> hogs;
  for (int i = 0; i < 2; ++i) hogs.push_back(connect());
  for (Client& hog : hogs) {
    hog.enter("disk");
    threads.emplace_back([&hog, &done] {
      // Refused at once: what costs the client least.
      Bytes batch;
      for (int n = 0; n < 4000; ++n) {
        const Bytes one = hog.request(9, 1, 0, 0);
        batch.insert(batch.end(), one.begin(), one.end());
      }
      while (!done) hog.send(batch);
    });
    threads.emplace_back([&hog, &done] {
      std::vector<std::byte> sink(256 << 10);
      while (!done && ::recv(hog.fd(), sink.data(), sink.size(), 0) > 0) {
      }
    });
  }
  ::usleep(200'000);
  // A client that is not answered gives up after a while, and that is a failure.
  for (int i = 0; i < 4; ++i) {
    Client client = connect();
    client.enter("disk");
    EXPECT_EQ(client.read(0, 512).size(), 512u);
  }
  // Nor from its end.
  const auto limit = base::Clock::now() + std::chrono::seconds(20);
  on_fiber([&] { EXPECT_TRUE(server_->stop(limit).empty()); });
  done = true;
  for (std::thread& each : threads) each.join();
}

class OneLoop : public ServerTest {
 protected:
  OneLoop() : ServerTest({}, 1) {}
  // That the only client has had answered or refused.
  unsigned long requests_done() {
    for (const std::string& line : server_->describe()) {
      const size_t at = line.find("in flight, ");
      if (at != line.npos) return std::stoul(line.substr(at + 11));
    }
    return 0;
  }
};

// Thousands of requests are there at once: whoever else wants the loop does not wait for them all.
TEST_F(OneLoop, ATurnEndsBeforeTheRequestsDo) {
  constexpr int kRequests = 4000;
  add("disk", "driver=memory,size=1M");
  Client client = connect();
  client.enter("disk");
  Bytes batch;
  for (int n = 0; n < kRequests; ++n) {
    const Bytes one = client.request(9, 1, 0, 0);  // refused
    batch.insert(batch.end(), one.begin(), one.end());
  }
  unsigned long seen = 0;
  on_fiber([&] {
    client.send(batch);  // the loop is here, so that nothing is received meanwhile
    while ((seen = requests_done()) == 0) base::EventLoop::current()->yield();
  });
  EXPECT_LT(seen, kRequests / 4);
}

TEST_F(ServerLife, ADestroyedServerCutsItsClients) {
  add("disk", "driver=memory,size=1M");
  Client client = connect();
  client.enter("disk");
  Client shaking = connect();
  shaking.greet();
  server_.reset();
  EXPECT_TRUE(client.closed());
  EXPECT_TRUE(shaking.closed());
  // The handle is given up when the last of them has ended; the graph has to outlive that.
  EXPECT_TRUE(node_is_free());
}

TEST_F(ServerLife, ClientsComeAndGo) {
  add("disk", "driver=memory,size=1M");
  for (int i = 0; i < 1000; ++i) {
    Client client = connect();
    if (i % 3 == 0) continue;
    client.enter("disk");
    if (i % 3 == 1) client.send(client.request(kRead, 1, 0, 65536));
  }
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.read(0, 512).size(), 512u);
}

// Requests for 256 MiB, of which at most the budget is ever held; afterwards all of them come.
class SmallMemory : public ServerTest {
 protected:
  SmallMemory() : ServerTest({.memory = 1, .connection_memory = 1}) {
    add("disk", "driver=null,size=1G");
  }
  uint64_t used() {
    for (const std::string& line : server_->describe()) {
      const auto at = line.find("memory: ");
      if (at != line.npos) return std::stoull(line.substr(at + 8));
    }
    ADD_FAILURE();
    return 0;
  }
};

TEST_F(SmallMemory, AClientThatDoesNotReadHoldsOnlyItsShare) {
  Client client = connect();
  client.enter("disk");
  constexpr uint64_t kCount = 64;
  for (uint64_t i = 0; i < kCount; ++i) {
    client.send(client.request(kRead, i, i * (8 << 20), 4 << 20));
  }
  ::usleep(100'000);
  EXPECT_LE(used(), uint64_t{34} << 20);
  // Nobody else suffers.
  Client other = connect();
  other.enter("disk");
  EXPECT_EQ(other.read(0, 1 << 20).size(), 1u << 20);
  for (uint64_t i = 0; i < kCount; ++i) EXPECT_EQ(client.simple(4 << 20).error, 0u);
  // And nothing stays taken.
  for (int i = 0; i < 100 && used() != 0; ++i) ::usleep(10'000);
  EXPECT_EQ(used(), 0u);
}

TEST_F(SmallMemory, ManySmallRepliesThatNobodyReadsAreBoundedToo) {
  Client client = connect();
  client.enter("disk", true);
  // Errors cost the client nothing; they must not cost the server without bound either.
  std::thread flood([&] {
    Bytes batch;
    for (uint64_t i = 0; i < 1000; ++i) batch = join({batch, client.request(9, i, 0, 0)});
    for (int i = 0; i < 200; ++i) client.send(batch);
  });
  ::usleep(200'000);
  EXPECT_LE(used(), uint64_t{34} << 20);
  for (int i = 0; i < 200'000; ++i) {
    if (client.chunk().error != 22) break;
    if (HasFailure()) break;
  }
  flood.join();
}

class Impatient : public ServerTest {
 protected:
  Impatient()
      : ServerTest({.idle_limit = milliseconds(200),
                    .memory = 1,
                    .connection_memory = 1,
                    .stall_limit = milliseconds(1)}) {
    add("disk", "driver=null,size=1G");
  }
};

TEST_F(Impatient, SilentClientsAreCutOff) {
  Client client = connect();
  client.enter("disk");
  EXPECT_TRUE(client.closed());
}

// Two hold all memory and read nothing; a third comes through because they are given up.
TEST_F(Impatient, ClientsThatStallAreCutOffWhenOthersNeedTheirMemory) {
  Client hogs[] = {connect(), connect()};
  for (Client& hog : hogs) {
    hog.enter("disk");
    hog.send(hog.request(kRead, 1, 0, 32 << 20));
    hog.send(hog.request(kRead, 2, 0, 32 << 20));
  }
  ::usleep(100'000);
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.read(0, 32 << 20).size(), 32u << 20);
}

class Slow : public ServerTest {
 protected:
  Slow()
      : ServerTest({.memory = uint64_t{70} << 20,
                    .connection_memory = 1,
                    .stall_limit = milliseconds(100)}) {
    add("disk", "driver=null,size=1G");
  }
};

// Two announce payloads for which all memory is set aside, and do not send them.
TEST_F(Slow, ClientsThatAnnounceDataAndDoNotSendItAreCutOffWhenOthersNeedTheMemory) {
  Client hogs[] = {connect(), connect()};
  for (Client& hog : hogs) {
    hog.enter("disk");
    hog.send(join({hog.request(kWrite, 1, 0, 32 << 20), Bytes(100'000)}));
  }
  ::usleep(300'000);
  // Nobody needs it: they may take their time.
  std::byte byte;
  for (const Client& hog : hogs) {
    EXPECT_LT(::recv(hog.fd(), &byte, 1, MSG_DONTWAIT), 0);
    EXPECT_EQ(errno, EAGAIN);
  }
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.read(0, 32 << 20).size(), 32u << 20);
}

TEST(Budgets, AreHandedOutInOrderAndTakenBackWhenCancelled) {
  base::LoopGroup loops(1);
  Budget budget(100);
  std::string order;
  base::CancelSource never;
  base::CancelSource cancel;
  base::WaitGroup group;
  loops.loop(0).call("test", [&] {
    ASSERT_TRUE(budget.try_acquire(90));
    group.add(3);
    loops.loop(0).spawn("large", [&] {
      EXPECT_FALSE(budget.acquire(80, cancel));
      order += "c";
      group.done();
    });
    loops.loop(0).spawn("second", [&] {
      EXPECT_TRUE(budget.acquire(20, never));
      order += "2";
      group.done();
    });
    loops.loop(0).spawn("third", [&] {
      EXPECT_TRUE(budget.acquire(5, never));
      order += "3";
      group.done();
    });
    base::io::sleep_for(milliseconds(1));
    EXPECT_TRUE(budget.contended());
    EXPECT_FALSE(budget.try_acquire(1));  // ten are free, but others were first
    budget.release(20);
    base::io::sleep_for(milliseconds(1));
    EXPECT_EQ(order, "");  // the large one is not overtaken
    cancel.cancel();
    group.wait();
    EXPECT_EQ(order, "c23");
    EXPECT_EQ(budget.used(), 95u);
    budget.release(95);
    EXPECT_FALSE(budget.contended());
  });
}

TEST(Budgets, AnAccountKeepsNothingThatItDoesNotUseWhileItsClientWaits) {
  Budgets budgets(1 << 20);
  Account account(budgets, 512 << 10);
  EXPECT_TRUE(account.try_take(1000));
  EXPECT_GT(budgets.used(), 1000u);  // in steps
  EXPECT_FALSE(account.try_take(512 << 10));
  EXPECT_FALSE(account.within_limit(512 << 10));
  account.set_eager(true);
  EXPECT_EQ(budgets.used(), 1000u);
  account.give_back(1000);
  EXPECT_EQ(budgets.used(), 0u);
}

TEST(Budgets, AShareIsKeptForSmallRequests) {
  Budgets budgets(16 << 20);
  Account hog(budgets, 16 << 20);
  EXPECT_TRUE(hog.try_take(15 << 20));
  EXPECT_FALSE(hog.try_take(Budgets::kSmall + 1));
  Account client(budgets, 16 << 20);
  EXPECT_FALSE(client.try_take(Budgets::kSmall + 1));
  EXPECT_TRUE(client.try_take(Budgets::kSmall));
  EXPECT_EQ(budgets.kept().used(), Budgets::kSmall);
  // What is open again is used first, and the share comes back before anything else.
  hog.give_back(15 << 20);
  hog.settle();
  EXPECT_TRUE(client.try_take(Budgets::kSmall));
  EXPECT_EQ(budgets.kept().used(), Budgets::kSmall);
  client.give_back(Budgets::kSmall);
  client.settle();
  EXPECT_EQ(budgets.kept().used(), 0u);
  EXPECT_EQ(budgets.open().used(), Budgets::kSmall);
  client.give_back(Budgets::kSmall);
  client.settle();
  EXPECT_EQ(budgets.used(), 0u);
}

// Who only looks at the state is no client.
TEST_F(ServerLife, AnExportThatSomebodyDescribesIsNotInUse) {
  std::atomic<bool> over{false};
  std::vector<std::thread> lookers;
  for (int i = 0; i < 2; ++i) {
    lookers.emplace_back([&] {
      while (!over) EXPECT_FALSE(server_->describe().empty());
    });
  }
  constexpr int kRounds = 500;
  for (int i = 0; i < kRounds && !HasFailure(); ++i) {
    add("disk", "driver=null,size=1M");
    EXPECT_EQ(
        error_number([&] { on_fiber([&] { server_->remove_export("disk", soon(), true); }); }), 0);
    if (!HasFailure()) on_fiber([&] { graph_.remove("node" + std::to_string(nodes_)); });
  }
  over = true;
  for (std::thread& looker : lookers) looker.join();
}

}  // namespace
}  // namespace minivmm::nbd
