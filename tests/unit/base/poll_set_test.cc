// SPDX-License-Identifier: Apache-2.0
#include "base/poll_set.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <vector>

#include <gtest/gtest.h>

#include "base/unique_fd.h"

namespace minivmm::base {
namespace {

class Completed final : public CompletionSink {
 public:
  void on_complete(IoOp& op) noexcept override { ops.push_back(&op); }
  std::vector<IoOp*> ops;
};

class Given final : public IoBackend {
 public:
  const char* name() const noexcept override { return "test"; }
  void submit(IoOp& op) noexcept override { ops.push_back(&op); }
  void cancel(IoOp& /*op*/) noexcept override {}
  void poll(std::optional<std::chrono::nanoseconds> /*timeout*/,
            CompletionSink& /*sink*/) override {}
  void wake() noexcept override {}
  std::vector<IoOp*> ops;
};

struct Waiting {
  UniqueFd fd{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  IoOp op{.opcode = IoOpcode::kPoll, .fd = fd.get(), .flags = POLLIN};

  void make_ready() const {
    const uint64_t one = 1;
    ASSERT_EQ(::write(fd.get(), &one, sizeof one), ssize_t{sizeof one});
  }
};

class PollSetTest : public testing::Test {
 protected:
  void look() { set_.look(completed_, given_); }

  PollSet set_;
  Completed completed_;
  Given given_;
  std::array<Waiting, PollSet::kMost + 1> waiting_;
};

using Ops = std::vector<IoOp*>;

TEST_F(PollSetTest, CompletesWhatIsReady) {
  for (size_t i = 0; i < 3; ++i) ASSERT_TRUE(set_.add(waiting_[i].op));
  look();
  EXPECT_EQ(completed_.ops, Ops{});
  waiting_[1].make_ready();
  look();
  EXPECT_EQ(completed_.ops, Ops{&waiting_[1].op});
  EXPECT_EQ(waiting_[1].op.result, POLLIN);
  look();
  EXPECT_EQ(completed_.ops.size(), 1U);
  waiting_[0].make_ready();
  waiting_[2].make_ready();
  look();
  EXPECT_EQ(completed_.ops.size(), 3U);
  EXPECT_TRUE(set_.empty());
  EXPECT_EQ(given_.ops, Ops{});
}

TEST_F(PollSetTest, IsBounded) {
  for (size_t i = 0; i < PollSet::kMost; ++i) ASSERT_TRUE(set_.add(waiting_[i].op));
  EXPECT_FALSE(set_.add(waiting_.back().op));
  set_.hand_over(given_);
  EXPECT_EQ(given_.ops.size(), PollSet::kMost);
  EXPECT_TRUE(set_.empty());
  EXPECT_TRUE(set_.add(waiting_.back().op));
}

TEST_F(PollSetTest, ForgetsWhatIsTakenOut) {
  for (size_t i = 0; i < 3; ++i) ASSERT_TRUE(set_.add(waiting_[i].op));
  EXPECT_TRUE(set_.remove(waiting_[0].op));
  EXPECT_FALSE(set_.remove(waiting_[0].op));
  for (const Waiting& each : waiting_) each.make_ready();
  look();
  EXPECT_EQ(completed_.ops.size(), 2U);
  EXPECT_FALSE(set_.remove(waiting_[1].op));
}

TEST_F(PollSetTest, GivesUpWhatOthersPassOver) {
  ASSERT_TRUE(set_.add(waiting_[0].op));
  for (unsigned i = 0; i < 2 * PollSet::kPatience; ++i) look();
  EXPECT_EQ(given_.ops, Ops{}) << "nothing else was ready";
  waiting_[1].make_ready();
  for (unsigned i = 0; i < PollSet::kPatience; ++i) {
    EXPECT_EQ(given_.ops, Ops{});
    ASSERT_TRUE(set_.add(waiting_[1].op));
    look();
  }
  EXPECT_EQ(given_.ops, Ops{&waiting_[0].op});
  EXPECT_EQ(completed_.ops.size(), PollSet::kPatience);
}

TEST_F(PollSetTest, SaysWhatIsNoDescriptor) {
  waiting_[0].fd.reset();
  ASSERT_TRUE(set_.add(waiting_[0].op));
  look();
  ASSERT_EQ(completed_.ops.size(), 1U);
  EXPECT_EQ(waiting_[0].op.result, -EBADF);
}

}  // namespace
}  // namespace minivmm::base
