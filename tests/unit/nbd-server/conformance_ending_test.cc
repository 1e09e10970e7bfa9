// SPDX-License-Identifier: Apache-2.0
// What the protocol says of a server that ends a session (an export is withdrawn, or the server
// stops): requests in flight SHOULD be finished first, and what comes meanwhile SHOULD be answered
// with ESHUTDOWN. Clients of other exports do not notice.
#include <string>
#include <unistd.h>

#include <future>

#include "base/sync.h"
#include "conformance.h"

namespace minivmm::nbd {
namespace {

using namespace conformance;

constexpr uint32_t kShutdown = 108;
constexpr uint64_t kHeld = 4096;  // where a request is not done before it is allowed
constexpr uint64_t kSlow = 0x736c6f77;

class HeldNode final : public block::Node {
 public:
  HeldNode(std::binary_semaphore& begun, base::Event& allowed)
      : Node("held", "held", false), begun_(begun), allowed_(allowed) {
    set_size(kSize);
    block::Limits limits;
    limits.can_discard = limits.can_write_zeroes = true;
    set_limits(limits);
  }

 private:
  void wait(uint64_t offset) {
    if (offset != kHeld) return;
    begun_.release();
    allowed_.wait();
  }
  void driver_read(uint64_t offset, base::IoSpan to) override {
    wait(offset);
    base::fill_zero(to, 0, to.bytes());
  }
  void driver_write(uint64_t offset, base::IoSpan, block::WriteFlags) override { wait(offset); }
  void driver_write_zeroes(uint64_t, uint64_t, block::ZeroFlags) override {}
  void driver_flush() override {}
  std::binary_semaphore& begun_;
  base::Event& allowed_;
};

enum class Way { kSimple, kStructured, kExtended };
enum class End { kWithdrawn, kStopped };

class Ending : public ServerTest, public testing::WithParamInterface<std::tuple<Way, End>> {
 protected:
  Ending() {
    add("d", "driver=memory,size=1M");
    on_fiber([&] {
      graph_.adopt(std::make_shared<HeldNode>(begun_, allowed_));
      server_->add_export("held",
                          graph_.attach("held", "the test", block::Permissions::front_end(true)),
                          {.description = "held", .writable = true});
    });
  }
  static Way way() { return std::get<Way>(GetParam()); }

  void enter(Client& c) {
    if (way() == Way::kExtended) {
      c.enter_extended("held", {"base:allocation"});
    } else {
      c.enter("held", way() == Way::kStructured, way() == Way::kStructured);
    }
  }
  Bytes request(Client& c, uint16_t type, uint64_t cookie, uint64_t offset, uint32_t length,
                uint16_t flags = 0) {
    if (way() != Way::kExtended) return c.request(type, cookie, offset, length, flags);
    if (type == kWrite) flags |= kPayloadLen;
    return c.long_request(type, cookie, offset, length, flags);
  }
  // The error of a request, whose reply is of the right kind and comes before the held one's.
  uint32_t error_of(Client& c, uint16_t type, uint64_t offset, uint32_t length, uint16_t flags = 0,
                    const Bytes& payload = {}) {
    const uint64_t cookie = ++cookie_;
    c.send(join({request(c, type, cookie, offset, length, flags), payload}));
    const Reply reply = c.chunk();
    EXPECT_EQ(reply.cookie, cookie);
    EXPECT_EQ(reply.flags & 1, 1);
    EXPECT_EQ(reply.extended, way() == Way::kExtended);
    if (way() == Way::kSimple) {
      EXPECT_FALSE(reply.structured);
    }
    return reply.error;
  }
  // A client whose request is not done before it is allowed.
  Client with_held() {
    Client out = connect();
    enter(out);
    out.send(request(out, kRead, kSlow, kHeld, 512));
    EXPECT_TRUE(begun_.try_acquire_for(std::chrono::seconds(10)));
    return out;
  }
  void expect_held_done(Client& c) {
    if (way() == Way::kSimple) {
      const Reply reply = c.simple(512);
      EXPECT_EQ(reply.cookie, kSlow);
      EXPECT_EQ(reply.error, 0u);
      EXPECT_EQ(reply.payload.size(), 512u);
      return;
    }
    const Reply reply = c.chunk();
    EXPECT_EQ(reply.cookie, kSlow);
    EXPECT_EQ(reply.error, 0u);
    EXPECT_EQ(reply.payload.size(), 8u + 512);
  }

  // Ends the export, or the server; what it reports is got by the future.
  std::future<std::string> begin_end() {
    return std::async(std::launch::async, [this, end = std::get<End>(GetParam())]() -> std::string {
      std::string out;
      try {
        on_fiber([&] {
          if (end == End::kWithdrawn) return server_->remove_export("held", soon());
          for (const std::string& line : server_->stop(soon())) out += line;
        });
      } catch (const base::Error& e) {
        out += e.what();
      }
      return out;
    });
  }
  // The held request is done, and with it what was begun by begin_end().
  void finish(Client& c, std::future<std::string> ended) {
    allowed_.set();
    expect_held_done(c);
    EXPECT_TRUE(c.closed());
    EXPECT_EQ(ended.get(), "");
  }
  // Until the client's session knows of it. A TRIM of nothing does nothing.
  void wait_until_it_ends(Client& c) {
    const auto limit = soon();
    while (error_of(c, kTrim, 0, 0) == 0 && base::Clock::now() < limit) ::usleep(1000);
  }
  void check_others() {
    if (std::get<End>(GetParam()) == End::kStopped) return;
    EXPECT_EQ(other_->read(0, 512).size(), 512u) << "another export's client noticed";
    Client late = connect();
    late.enter("d");
    EXPECT_EQ(late.read(512, 512).size(), 512u);
    Client too_late = connect();
    too_late.greet();
    EXPECT_EQ(too_late.final_of(kGo, go("held")), kErrUnknown);
  }
  void enter_other() {
    other_.emplace(connect());
    other_->enter("d");
    EXPECT_EQ(other_->read(0, 512).size(), 512u);
  }

  std::binary_semaphore begun_{0};
  base::Event allowed_;
  uint64_t cookie_ = 0x1000;
  std::optional<Client> other_;
};

std::string name_of(const testing::TestParamInfo<std::tuple<Way, End>>& given) {
  const auto [way, end] = given.param;
  const char* const how = way == Way::kSimple       ? "Simple"
                          : way == Way::kStructured ? "Structured"
                                                    : "Extended";
  return std::string(how) + (end == End::kWithdrawn ? "Withdrawn" : "Stopped");
}

INSTANTIATE_TEST_SUITE_P(EveryWay, Ending,
                         testing::Combine(testing::Values(Way::kSimple, Way::kStructured,
                                                          Way::kExtended),
                                          testing::Values(End::kWithdrawn, End::kStopped)),
                         name_of);

TEST_P(Ending, WhatIsInFlightIsFinishedAndWhatComesIsRefused) {
  enter_other();
  Client client = with_held();
  auto ended = begin_end();
  wait_until_it_ends(client);
  for (int round = 0; round < 2; ++round) {
    EXPECT_EQ(error_of(client, kRead, 0, 512), kShutdown);
    EXPECT_EQ(error_of(client, kRead, 0, 1 << 20), kShutdown);
    EXPECT_EQ(error_of(client, kWrite, 0, 512, 0, Bytes(512)), kShutdown);
    EXPECT_EQ(error_of(client, kWrite, 0, 1 << 20, kFua, Bytes(1 << 20)), kShutdown);
    EXPECT_EQ(error_of(client, kFlush, 0, 0), kShutdown);
    EXPECT_EQ(error_of(client, kTrim, 0, 512), kShutdown);
    EXPECT_EQ(error_of(client, kCache, 0, 512), kShutdown);
    EXPECT_EQ(error_of(client, kZeroes, 0, 512), kShutdown);
    if (way() != Way::kSimple) {
      EXPECT_EQ(error_of(client, kStatus, 0, 512), kShutdown);
    }
    // What is wrong is told so all the same.
    EXPECT_EQ(error_of(client, 99, 0, 512), kInval);
    EXPECT_EQ(error_of(client, kWrite, kSize, 512, 0, Bytes(512)), kNoSpc);
  }
  if (way() == Way::kExtended) {
    const Bytes query = join({be64(512), be32(1)});
    client.send(join({client.long_request(kStatus, 7, 0, query.size(), kPayloadLen), query}));
    EXPECT_EQ(client.chunk().error, kShutdown);
  }
  check_others();
  EXPECT_EQ(ended.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
  finish(client, std::move(ended));
}

// As it MUST do when it is told so; what is in flight is answered first.
TEST_P(Ending, AClientThatLeavesThenIsLetGo) {
  enter_other();
  Client client = with_held();
  auto ended = begin_end();
  wait_until_it_ends(client);
  client.send(request(client, kDisc, 9, 0, 0));
  finish(client, std::move(ended));
  check_others();
}

// A write whose data are on their way was accepted before.
TEST_P(Ending, AWriteThatIsHalfThereIsFinished) {
  Client client = with_held();
  client.send(join({request(client, kWrite, 5, 0, 8192), Bytes(4096)}));
  // Nothing that could be asked tells that it has begun: what was sent before is what counts.
  ::usleep(20'000);
  auto ended = begin_end();
  ::usleep(20'000);
  client.send(Bytes(4096));
  const Reply reply = client.chunk();
  EXPECT_EQ(reply.cookie, 5u);
  EXPECT_EQ(reply.error, 0u);
  EXPECT_EQ(error_of(client, kTrim, 0, 0), kShutdown);
  finish(client, std::move(ended));
}

// Many at once, more than a session takes in a turn, behind one that is in flight: each is
// answered, in whatever way.
TEST_P(Ending, WhateverIsThereIsAnswered) {
  constexpr uint64_t kMany = 2000;
  Client client = with_held();
  auto ended = begin_end();
  Bytes all;
  for (uint64_t i = 0; i < kMany; ++i) all = join({all, request(client, kTrim, i, 0, 0)});
  client.send(all);
  for (uint64_t i = 0; i < kMany; ++i) {
    const Reply reply = client.chunk();
    EXPECT_EQ(reply.cookie, i);
    if (reply.error != 0) {
      EXPECT_EQ(reply.error, kShutdown);
    }
  }
  wait_until_it_ends(client);
  finish(client, std::move(ended));
}

}  // namespace
}  // namespace minivmm::nbd
