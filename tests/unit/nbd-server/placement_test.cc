// SPDX-License-Identifier: Apache-2.0
// Which loop serves a client: the rule by itself, then clients that change loops.
#include "nbd-server/placement.h"

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "fixture.h"

namespace minivmm::nbd {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class PlacementTest : public testing::Test {
 protected:
  // So many notes; true if the last one asks for a decision, which no other may.
  bool note(bool alternating, unsigned times = 1) {
    for (unsigned i = 1; i < times; ++i) EXPECT_FALSE(placement_.note(alternating)) << i;
    return placement_.note(alternating);
  }
  bool decide(Placement::Clock::duration busy_for = {}) {
    const bool moves = placement_.decide(now_, now_ - busy_for);
    if (moves) placement_.move();
    return moves;
  }
  void go_away() {
    ASSERT_TRUE(note(true, Placement::kEnough));
    ASSERT_TRUE(decide());
    ASSERT_EQ(&placement_.here(), &shared_);
  }

  base::EventLoop home_;
  base::EventLoop shared_;
  Placement placement_{home_, &shared_};
  Placement::Clock::time_point now_{seconds(1000)};
};

TEST_F(PlacementTest, OneRequestAfterTheOtherForLongEnoughIsShared) {
  EXPECT_EQ(&placement_.here(), &home_);
  EXPECT_FALSE(note(true, Placement::kEnough - 1));
  EXPECT_FALSE(note(false));
  EXPECT_FALSE(note(true, Placement::kSetback));
  EXPECT_TRUE(note(true));
  EXPECT_TRUE(decide());
  EXPECT_EQ(&placement_.here(), &shared_);
}

TEST_F(PlacementTest, WhoSendsMoreAtOnceGoesHomeAndMayComeBack) {
  go_away();
  EXPECT_TRUE(note(false, Placement::kEnough / Placement::kSetback));
  EXPECT_TRUE(decide());
  EXPECT_EQ(&placement_.here(), &home_);
  go_away();
}

TEST_F(PlacementTest, AFewRequestsAtOnceAreNoReason) {
  go_away();
  for (unsigned i = 0; i < Placement::kEnough; ++i) {
    if (note(i % (2 * Placement::kSetback) != 0)) {
      EXPECT_FALSE(decide());
    }
  }
  EXPECT_TRUE(placement_.away());
}

TEST_F(PlacementTest, LeavesALoopThatHasTooMuchToDoForLongerEachTime) {
  auto stay = Placement::kShortestStay;
  for (unsigned i = 0; i < 10; ++i) {
    go_away();
    EXPECT_TRUE(note(true, Placement::kEnough));
    EXPECT_FALSE(decide(Placement::kSaturated - milliseconds(1)));
    EXPECT_TRUE(note(true, Placement::kEnough));
    EXPECT_TRUE(decide(Placement::kSaturated));
    EXPECT_EQ(&placement_.here(), &home_);
    now_ += stay - milliseconds(1);
    EXPECT_TRUE(note(true, Placement::kEnough));
    EXPECT_FALSE(decide());
    now_ += milliseconds(1);
    stay = std::min(2 * stay, Placement::kLongestStay);
  }
}

// With something in hand it cannot move, and does not decide.
TEST_F(PlacementTest, AsksAgainUntilThereIsADecision) {
  EXPECT_TRUE(note(true, Placement::kEnough));
  EXPECT_TRUE(note(true));
  EXPECT_TRUE(decide());
  EXPECT_TRUE(note(true, Placement::kEnough));
  EXPECT_TRUE(note(true));
  EXPECT_TRUE(decide(Placement::kSaturated));
}

TEST_F(PlacementTest, StaysWhereThereIsNoOtherLoop) {
  for (base::EventLoop* const shared : {static_cast<base::EventLoop*>(nullptr), &home_}) {
    Placement alone(home_, shared);
    for (unsigned i = 0; i < 2 * Placement::kEnough; ++i) ASSERT_FALSE(alone.note(true));
  }
  go_away();
  placement_.stay();
  EXPECT_EQ(&placement_.here(), &home_);
  EXPECT_FALSE(note(true, 2 * Placement::kEnough));
}

constexpr uint16_t kRead = 0;
constexpr uint16_t kWrite = 1;

// Says on which loop it was read last.
class Whereabouts final : public block::Node {
 public:
  Whereabouts() : Node("whereabouts", "whereabouts", false) { set_size(1 << 20); }
  unsigned loop() const { return loop_.load(); }

 private:
  void driver_read(uint64_t /*offset*/, base::IoSpan to) override {
    for (size_t i = 0; i < to.count(); ++i)
      std::memset(to.data()[i].iov_base, 0, to.data()[i].iov_len);
    loop_ = base::EventLoop::current()->index();
  }
  void driver_write(uint64_t, base::IoSpan, block::WriteFlags) override {}
  void driver_flush() override {}

  std::atomic<unsigned> loop_{base::EventLoop::kMaxLoops};
};

class Gathering : public ServerTest {
 protected:
  static constexpr unsigned kLoops = 3;

  Gathering() : ServerTest(options(), kLoops) {
    on_fiber([&] {
      graph_.adopt(node_);
      server_->add_export(
          "disk", graph_.attach("whereabouts", "NBD export", block::Permissions::front_end(true)),
          {.description = "", .writable = true});
    });
  }
  static ServerOptions options() {
    ServerOptions out;
    out.shared_loops = 1;
    return out;
  }
  unsigned shared() { return loops_.loop(0).index(); }
  unsigned where(Client& client) {
    (void)client.read(0, 512);
    return node_->loop();
  }
  // One request after the other until it is on the shared loop. A server that is slow, or finds the
  // loop saturated on a loaded machine, may take a while.
  void alternate(Client& client) {
    const auto limit = base::Clock::now() + seconds(60);
    do {
      for (unsigned i = 0; i < Placement::kEnough; ++i) (void)client.read(0, 512);
    } while (where(client) != shared() && base::Clock::now() < limit);
    ASSERT_EQ(where(client), shared());
  }
  static void burst(Client& client, unsigned count = 8) {
    Bytes all;
    for (unsigned i = 0; i < count; ++i) {
      all = join({all, client.request(kRead, i, uint64_t{4096} * i, 512)});
    }
    client.send(all);
    for (unsigned i = 0; i < count; ++i) EXPECT_EQ(client.simple(512).error, 0u);
  }
  // Three, each on a loop of its own.
  std::vector<Client> clients() {
    std::vector<Client> out;
    for (unsigned i = 0; i < kLoops; ++i) {
      out.push_back(connect());
      out.back().enter("disk");
    }
    return out;
  }

  const std::shared_ptr<Whereabouts> node_ = std::make_shared<Whereabouts>();
};

TEST_F(Gathering, ThoseWhoAlternateShareALoopAndOthersHaveTheirOwn) {
  std::vector<Client> all = clients();
  std::vector<unsigned> homes;
  for (Client& each : all) homes.push_back(where(each));
  EXPECT_NE(homes[0], homes[1]);
  EXPECT_NE(homes[1], homes[2]);
  EXPECT_NE(homes[0], homes[2]);
  for (Client& each : all) ASSERT_NO_FATAL_FAILURE(alternate(each));
  for (unsigned i = 0; i < kLoops; ++i) {
    EXPECT_EQ(where(all[i]), shared()) << i;
    for (unsigned n = 0; n < Placement::kEnough / Placement::kSetback + 1; ++n) burst(all[i]);
    EXPECT_EQ(where(all[i]), homes[i]) << i;
  }
}

// Nothing is lost or done twice where requests come while it changes loops.
TEST_F(Gathering, ChangingLoopsLosesNothing) {
  add("memory", "driver=memory,size=1M");
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  (void)connect();  // the next one's home is not the shared loop
  Client client = connect();
  client.enter("memory");
  constexpr uint64_t kBlocks = 256;
  std::vector<uint8_t> model(kBlocks);
  for (unsigned phase = 0; phase < 24; ++phase) {
    const bool alternating = phase % 2 == 0;
    unsigned left = alternating ? Placement::kEnough + 8 : Placement::kEnough;
    while (left > 0) {
      const unsigned count =
          alternating ? 1 : std::min(left, 4U + static_cast<unsigned>(random() % 9));
      left -= count;
      Bytes all;
      std::vector<std::pair<bool, uint64_t>> sent;
      for (unsigned i = 0; i < count; ++i) {
        // Different blocks: those of one batch may be done in any order.
        const uint64_t block = (random() % (kBlocks / 16)) * 16 + i;
        const bool write = random() % 2 == 0;
        sent.emplace_back(write, block);
        if (!write) {
          all = join({all, client.request(kRead, i, block * 4096, 512)});
          continue;
        }
        model[block] = static_cast<uint8_t>(random());
        all = join({all, client.request(kWrite, i, block * 4096, 512),
                    Bytes(512, std::byte{model[block]})});
      }
      // In two parts, so that the server may have a part of a header when it goes.
      const auto part = all.begin() + static_cast<ptrdiff_t>(random() % all.size());
      client.send({all.begin(), part});
      if (!alternating) ::usleep(200);
      client.send({part, all.end()});
      std::vector<bool> seen(count);
      for (unsigned i = 0; i < count; ++i) {
        Reply reply = client.simple();
        ASSERT_EQ(reply.error, 0u);
        ASSERT_LT(reply.cookie, count);
        ASSERT_FALSE(seen[reply.cookie]);
        seen[reply.cookie] = true;
        const auto [write, block] = sent[reply.cookie];
        if (!write) {
          ASSERT_EQ(client.receive(512), Bytes(512, std::byte{model[block]})) << block;
        }
      }
    }
  }
}

TEST_F(Gathering, TheServerEndsThoseWhoAreAway) {
  std::vector<Client> all = clients();
  for (Client& each : all) ASSERT_NO_FATAL_FAILURE(alternate(each));
  // Long before they would be cut off.
  on_fiber([&] { server_->remove_export("disk", base::Clock::now() + std::chrono::hours(1)); });
  for (Client& each : all) EXPECT_TRUE(each.closed());
}

TEST_F(Gathering, ThoseWhoAreAwayLeave) {
  {
    std::vector<Client> all = clients();
    for (Client& each : all) ASSERT_NO_FATAL_FAILURE(alternate(each));
  }
  const auto limit = soon();
  const auto somebody_is_there = [&] {
    for (const std::string& line : server_->describe()) {
      if (line.starts_with("NBD client ")) return true;
    }
    return false;
  };
  while (somebody_is_there() && base::Clock::now() < limit) ::usleep(1000);
  EXPECT_FALSE(somebody_is_there());
}

}  // namespace
}  // namespace minivmm::nbd
