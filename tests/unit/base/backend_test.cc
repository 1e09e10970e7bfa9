// SPDX-License-Identifier: Apache-2.0
// A backend by itself, with a ring far smaller than what is in flight.
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <memory>

#include <gtest/gtest.h>

#include "base/io_backend.h"
#include "base/unique_fd.h"

namespace minivmm::base {
namespace {

class Counter final : public CompletionSink {
 public:
  void on_complete(IoOp& op) noexcept override {
    ++completed;
    cancelled += op.result == -ECANCELED ? 1U : 0U;
  }
  unsigned completed = 0;
  unsigned cancelled = 0;
};

class BackendTest : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    backend_ = GetParam() ? make_uring_backend(2) : make_epoll_backend(2);
    int pair[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    ours_.reset(pair[0]);
    theirs_.reset(pair[1]);
    for (IoOp& op : ops_) {
      op.opcode = IoOpcode::kPoll;
      op.fd = ours_.get();
      op.flags = POLLIN;
      backend_->submit(op);
    }
  }
  void poll_until(unsigned completed) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (counter_.completed < completed && std::chrono::steady_clock::now() < limit) {
      backend_->poll(std::chrono::milliseconds(10), counter_);
    }
    ASSERT_EQ(counter_.completed, completed);
  }

  std::unique_ptr<IoBackend> backend_;
  UniqueFd ours_;
  UniqueFd theirs_;
  std::array<IoOp, 100> ops_{};
  Counter counter_;
};

INSTANTIATE_TEST_SUITE_P(Backends, BackendTest, testing::Bool(),
                         [](const auto& param) { return param.param ? "uring" : "epoll"; });

// A cancel that is lost leaves a fiber, and the loop with it, waiting for ever.
TEST_P(BackendTest, CancelsManyMoreThanTheRingHolds) {
  backend_->poll(std::chrono::nanoseconds(0), counter_);
  EXPECT_EQ(counter_.completed, 0U);
  for (IoOp& op : ops_) backend_->cancel(op);
  ASSERT_NO_FATAL_FAILURE(poll_until(100));
  EXPECT_EQ(counter_.cancelled, 100U);
}

// The kernel does not know most of them yet.
TEST_P(BackendTest, CancelsWhatStillWaitsForRoom) {
  for (IoOp& op : ops_) backend_->cancel(op);
  ASSERT_NO_FATAL_FAILURE(poll_until(100));
  EXPECT_EQ(counter_.cancelled, 100U);
}

TEST_P(BackendTest, CompletesManyMoreThanTheRingHolds) {
  ASSERT_EQ(::send(theirs_.get(), "x", 1, 0), 1);
  ASSERT_NO_FATAL_FAILURE(poll_until(100));
  EXPECT_EQ(counter_.cancelled, 0U);
  for (const IoOp& op : ops_) EXPECT_EQ(op.result & POLLIN, POLLIN);
}

// Whoever believes it does not poll: saying so falsely would leave a completion lying.
TEST_P(BackendTest, IsNotQuietWhileThereIsSomething) {
  EXPECT_FALSE(backend_->quiet()) << "nothing was handed over yet";
  for (unsigned i = 0; i < 100; ++i) backend_->poll(std::chrono::nanoseconds(0), counter_);
  ASSERT_EQ(counter_.completed, 0U);
  if (!GetParam()) {
    EXPECT_FALSE(backend_->quiet()) << "epoll tells nothing without a call";
  }
  ASSERT_EQ(::send(theirs_.get(), "x", 1, 0), 1);
  EXPECT_FALSE(backend_->quiet());
  while (counter_.completed < 100) {
    ASSERT_FALSE(backend_->quiet()) << counter_.completed << " of 100";
    backend_->poll(std::chrono::milliseconds(10), counter_);
  }
  backend_->poll(std::chrono::nanoseconds(0), counter_);
  backend_->wake();
  EXPECT_FALSE(backend_->quiet()) << "it was woken";
}

}  // namespace
}  // namespace minivmm::base
