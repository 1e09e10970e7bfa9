// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/send_pace.h"

#include <algorithm>

#include <gtest/gtest.h>

namespace minivmm::nbd {
namespace {

// A client that keeps `depth` requests outstanding, and a server that is always behind it: what is
// sent while it works comes back as requests by the next receive.
class Conversation {
 public:
  explicit Conversation(size_t depth) noexcept : in_socket_(depth) {}

  // One receive and what follows of it. `waits`: the client has read everything first.
  void turn(bool waits) {
    pace_.receives(requests_);
    if (waits) {
      pace_.waits();
      in_socket_ += std::exchange(unread_, 0);
    }
    size_t left = std::exchange(in_socket_, 0);
    // Behind the socket the client reads what left before the receive.
    in_socket_ += std::exchange(unread_, 0);
    for (size_t gathered = 0; left > 0;) {
      --left;
      ++requests_;
      if (++gathered < pace_.replies() && left > 0) continue;
      pace_.sends(gathered);
      in_socket_ += std::exchange(unread_, std::exchange(gathered, 0));
    }
  }
  size_t replies() const noexcept { return pace_.replies(); }

 private:
  SendPace pace_;
  size_t in_socket_;
  size_t unread_ = 0;
  uint64_t requests_ = 0;
};

// A whole batch at once would make client and server take turns.
TEST(SendPace, HalfOfWhatTheClientHasOutstandingIsTheMost) {
  for (const size_t depth : {1U, 4U, 16U, 20U, 24U, 32U, 128U}) {
    for (const bool waits : {true, false}) {
      Conversation conversation(depth);
      for (int turn = 0; turn < 100; ++turn) {
        conversation.turn(waits);
        EXPECT_LE(conversation.replies(), std::max(depth / 2, SendPace::kLeast)) << depth;
      }
    }
  }
}

TEST(SendPace, AClientWithMuchOutstandingIsSentMuch) {
  for (const size_t depth : {32U, 64U, 128U}) {
    Conversation conversation(depth);
    for (int turn = 0; turn < 4; ++turn) conversation.turn(false);
    for (int turn = 0; turn < 100; ++turn) {
      conversation.turn(false);
      EXPECT_EQ(conversation.replies(), SendPace::kMost) << depth << " turn " << turn;
    }
  }
}

TEST(SendPace, FollowsAClientThatComesToHaveLess) {
  SendPace pace;
  uint64_t requests = 0;
  const auto receive = [&](uint64_t taken) {
    pace.receives(requests);
    pace.waits();
    requests += taken;
  };
  receive(64);
  receive(4);
  EXPECT_EQ(pace.replies(), SendPace::kMost);
  for (int turn = 0; turn < 30; ++turn) receive(4);
  EXPECT_EQ(pace.replies(), SendPace::kLeast);
}

}  // namespace
}  // namespace minivmm::nbd
