// SPDX-License-Identifier: Apache-2.0
// Clone exports: whose disk is whose, when one is made and when it is gone.
#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "fixture.h"

namespace minivmm::nbd {
namespace {

constexpr uint32_t kExportName = 1, kInfo = 6, kGo = 7;
constexpr uint16_t kWrite = 1;
constexpr uint16_t kCanMultiConn = 1 << 8;

// Disks of zeroes; counts those in use.
class Zeroes final : public CloneSource {
 public:
  explicit Zeroes(block::Graph& graph) : graph_(graph) {}

  block::Handle open(const std::string& client) override {
    if (broken) throw base::Error(ENOSPC, "no room for a clone");
    pass(client);
    const std::string name = "clone" + std::to_string(++made);
    graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=" + name));
    block::Handle disk = graph_.attach(name, "clone", block::Permissions::front_end(true));
    const std::lock_guard lock(mutex_);  // over no call that may suspend the fiber
    ++open_[client];
    return disk;
  }
  void close(block::Handle disk, const std::string& client) override {
    const std::string name = disk.node_name();
    pass(client);
    disk.close();
    graph_.remove(name);
    const std::lock_guard lock(mutex_);
    --open_[client];
    ++closed;
  }
  int in_use(const std::string& client) {
    const std::lock_guard lock(mutex_);
    return open_[client];
  }

  // Clients of this name are held up from then on, until let_on().
  void hold_up(const std::string& client) {
    const std::lock_guard lock(mutex_);
    held_up_ = client;
    let_on_.reset();
  }
  void let_on() { let_on_.set(); }

  std::atomic<int> waiting{0};
  std::atomic<int> made{0};
  std::atomic<int> closed{0};
  std::atomic<bool> broken{false};

 private:
  void pass(const std::string& client) {
    {
      const std::lock_guard lock(mutex_);
      if (client != held_up_) return;
    }
    ++waiting;
    let_on_.wait();
    --waiting;
  }

  block::Graph& graph_;
  std::mutex mutex_;
  std::string held_up_ = "-";  // guarded by mutex_
  base::Event let_on_;
  std::map<std::string, int> open_;
};

Bytes asking_for(std::string_view name) {
  return join({be32(static_cast<uint32_t>(name.size())), text(name), be16(0)});
}

class CloneTest : public ServerTest {
 protected:
  CloneTest() {
    add("disk", "driver=memory,size=1M");
    on_fiber([&] {
      graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=golden"));
      server_->add_clone_export(
          "golden", graph_.attach("golden", "base", block::Permissions::backing()), source_);
    });
  }

  void expect_closed(int count) {
    const auto until = soon();
    while (source_->closed < count && base::Clock::now() < until) std::this_thread::yield();
    EXPECT_EQ(source_->closed, count);
  }
  static uint32_t write(Client& client, char value) {
    return client.error_of(kWrite, 0, 16, 0, Bytes(16, static_cast<std::byte>(value)));
  }
  static char first(Client& client) { return static_cast<char>(client.read(0, 16).at(0)); }

  std::shared_ptr<Zeroes> source_ = std::make_shared<Zeroes>(graph_);
};

TEST_F(CloneTest, EachConnectionHasADiskOfItsOwn) {
  Client one = connect();
  Client two = connect();
  // Connections of one client would not see each other's writes: it must not open several.
  EXPECT_EQ(one.enter("golden") & kCanMultiConn, 0);
  EXPECT_EQ(two.enter("golden") & kCanMultiConn, 0);
  EXPECT_EQ(write(one, 'a'), 0U);
  EXPECT_EQ(write(two, 'b'), 0U);
  EXPECT_EQ(first(one), 'a');
  EXPECT_EQ(first(two), 'b');
  EXPECT_EQ(source_->in_use(""), 2);
  one.close();
  expect_closed(1);
  EXPECT_EQ(first(two), 'b');
}

TEST_F(CloneTest, ANameIsOneDiskForAllItsConnections) {
  Client one = connect();
  Client two = connect();
  Client other = connect();
  EXPECT_NE(one.enter("golden/alice") & kCanMultiConn, 0);
  EXPECT_NE(two.enter("golden/alice") & kCanMultiConn, 0);
  other.enter("golden/bob");
  EXPECT_EQ(write(one, 'a'), 0U);
  EXPECT_EQ(first(two), 'a');
  EXPECT_EQ(first(other), '\0');
  EXPECT_EQ(source_->made, 2);
  one.close();
  EXPECT_EQ(first(two), 'a');
  two.close();
  expect_closed(1);
  EXPECT_EQ(source_->in_use("alice"), 0);
  EXPECT_EQ(source_->in_use("bob"), 1);
}

// A disk may be slow to make, or to close, and wait for a server.
TEST_F(CloneTest, OneNameDoesNotWaitForAnother) {
  const auto expect_held_up = [&] {
    const auto until = soon();
    while (source_->waiting == 0 && base::Clock::now() < until) std::this_thread::yield();
    EXPECT_EQ(source_->waiting, 1);
  };
  source_->hold_up("slow");
  Client slow = connect();
  std::thread entering([&] { slow.enter("golden/slow"); });
  expect_held_up();
  Client bob = connect();
  bob.enter("golden/bob");
  bob.close();
  expect_closed(1);
  EXPECT_EQ(source_->waiting, 1);
  source_->let_on();
  entering.join();

  // Who comes while his disk is being closed gets another.
  source_->hold_up("slow");
  slow.close();
  expect_held_up();
  Client again = connect();
  std::thread coming([&] { again.enter("golden/slow"); });
  Client carol = connect();
  carol.enter("golden/carol");
  EXPECT_EQ(source_->made, 3);
  EXPECT_EQ(source_->waiting, 1);
  source_->let_on();
  coming.join();
  EXPECT_EQ(source_->made, 4);
  EXPECT_EQ(source_->in_use("slow"), 1);
}

TEST_F(CloneTest, LookingAtItMakesNoDisk) {
  Client client = connect();
  client.greet();
  const auto answers = client.option(kInfo, asking_for("golden"));
  ASSERT_EQ(answers.size(), 2U);
  // Writable, and for one connection.
  EXPECT_EQ(answers[0].data, join({be16(0), be64(1 << 20), be16(0b1100'0110'1101)}));
  const auto named = client.option(kInfo, join({be32(12), text("golden/alice"), be16(1), be16(1)}));
  ASSERT_EQ(named.size(), 3U);
  EXPECT_EQ(named[0].data, join({be16(0), be64(1 << 20), be16(0b1101'0110'1101)}));
  EXPECT_EQ(named[1].data, join({be16(1), text("golden/alice")}));
  EXPECT_EQ(source_->made, 0);
}

TEST_F(CloneTest, WhatIsNoNameOfAClientIsNoExport) {
  Client client = connect();
  client.greet();
  for (const std::string name : {"golden/", "golden/.hidden", "golden/a/b", "golden/a b",
                                 "golden/..", "disk/alice", "/alice", "nosuch/alice"}) {
    EXPECT_EQ(client.final_of(kGo, asking_for(name)), kErrUnknown) << name;
  }
  EXPECT_EQ(client.final_of(kGo, asking_for("golden/" + std::string(65, 'x'))), kErrUnknown);
  EXPECT_EQ(source_->made, 0);
  EXPECT_EQ(client.final_of(kGo, asking_for("golden/" + std::string(64, 'x'))), kAck);
}

TEST_F(CloneTest, AClientForWhichNoneCanBeMadeIsToldAndGoesOn) {
  source_->broken = true;
  Client client = connect();
  client.greet();
  EXPECT_EQ(client.final_of(kGo, asking_for("golden")), kErrUnknown);
  EXPECT_EQ(client.final_of(kGo, asking_for("disk")), kAck);
  // The older option cannot tell.
  Client old = connect();
  old.greet();
  old.send_option(kExportName, text("golden"));
  EXPECT_TRUE(old.closed());
  source_->broken = false;
  Client later = connect();
  later.enter("golden/alice");
  EXPECT_EQ(write(later, 'a'), 0U);
}

TEST_F(CloneTest, AClientThatLeavesAtOnceLeavesNothing) {
  for (int i = 0; i < 20; ++i) {
    Client client = connect();
    client.greet();
    client.send_option(kGo, asking_for(i % 2 == 0 ? "golden" : "golden/alice"));
    client.close();
  }
  const auto until = soon();
  while (base::Clock::now() < until) {
    const auto state = server_->describe();
    const bool gone = std::none_of(state.begin(), state.end(), [](const std::string& line) {
      return line.starts_with("NBD client ");
    });
    // A disk's closing may outlast its client by a moment.
    if (gone && source_->closed == source_->made) break;
    std::this_thread::yield();
  }
  EXPECT_EQ(source_->closed, source_->made);
}

// Those who find the disk of their name being closed get another one.
TEST_F(CloneTest, ComingAndGoingUnderOneNameNeverLosesOrSharesADisk) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 25; ++i) {
        Client client = connect();
        client.enter("golden/alice");
        EXPECT_EQ(write(client, 'a'), 0U);
        EXPECT_EQ(first(client), 'a');
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect_closed(source_->made);
  EXPECT_EQ(source_->in_use("alice"), 0);
}

TEST_F(CloneTest, WithdrawingTheExportEndsEveryClone) {
  Client one = connect();
  Client named = connect();
  Client other = connect();
  one.enter("golden");
  named.enter("golden/alice");
  other.enter("disk");
  on_fiber([&] { server_->remove_export("golden", soon()); });
  EXPECT_TRUE(one.closed());
  EXPECT_TRUE(named.closed());
  EXPECT_EQ(source_->closed, 2);
  EXPECT_EQ(write(other, 'x'), 0U);
  // Nothing holds the base any more.
  on_fiber([&] { graph_.remove("golden"); });
}

TEST_F(CloneTest, TheBaseCannotBeWrittenToMeanwhile) {
  EXPECT_EQ(error_number([&] {
              on_fiber([&] {
                (void)graph_.attach("golden", "a writer", block::Permissions::front_end(true));
              });
            }),
            EBUSY);
}

TEST_F(CloneTest, AHundredAtOnce) {
  std::vector<Client> clients;
  for (int i = 0; i < 100; ++i) clients.push_back(connect());
  for (Client& client : clients) client.enter("golden");
  for (size_t i = 0; i < clients.size(); ++i) EXPECT_EQ(write(clients[i], char(i)), 0U);
  for (size_t i = 0; i < clients.size(); ++i) EXPECT_EQ(first(clients[i]), char(i));
  EXPECT_EQ(source_->in_use(""), 100);
  clients.clear();
  expect_closed(100);
}

}  // namespace
}  // namespace minivmm::nbd
