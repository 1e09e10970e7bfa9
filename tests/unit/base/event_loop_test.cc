// SPDX-License-Identifier: Apache-2.0
// The loop, its fibers and their I/O, on both backends.
#include "base/event_loop.h"

#include <fcntl.h>
#include <poll.h>
#include <string>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <stdexcept>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/io.h"
#include "base/loop_group.h"
#include "base/pool.h"
#include "base/sync.h"
#include "base/unique_fd.h"

namespace minivmm::base {
namespace {

using std::chrono::milliseconds;

class LoopTest : public testing::TestWithParam<BackendChoice> {
 protected:
  LoopGroup loops_{2, GetParam()};
  EventLoop& a() { return loops_.loop(0); }
  EventLoop& b() { return loops_.loop(1); }
};

INSTANTIATE_TEST_SUITE_P(Backends, LoopTest,
                         testing::Values(BackendChoice::kUring, BackendChoice::kEpoll),
                         [](const auto& param) {
                           return param.param == BackendChoice::kUring ? "uring" : "epoll";
                         });

TEST_P(LoopTest, UsesTheBackendThatWasAskedFor) {
  const std::string expected = GetParam() == BackendChoice::kUring ? "io_uring" : "epoll";
  EXPECT_EQ(a().backend_name(), expected);
}

TEST_P(LoopTest, CallReturnsValuesAndRethrows) {
  EXPECT_EQ(a().call("test", [] { return 42; }), 42);
  EXPECT_THROW(a().call("test", []() -> int { throw Error(ENOSPC, "full"); }), Error);
}

TEST_P(LoopTest, SpawnNowRunsUntilTheFirstSuspension) {
  std::vector<int> order;
  a().call("test", [&] {
    Event go;
    WaitGroup group;
    group.add();
    a().spawn_now("child", [&] {
      order.push_back(1);
      go.wait();
      order.push_back(3);
      group.done();
    });
    order.push_back(2);
    go.set();
    group.wait();
  });
  EXPECT_EQ(order, (std::vector<int>{1, 2, 3}));
}

// A fiber suspended inside a catch block must find its own exception again: without saving
// __cxa_eh_globals at each switch the rethrow below picks up the other fiber's.
TEST_P(LoopTest, ExceptionsSurviveSuspensionInsideCatch) {
  constexpr int kFibers = 50;
  std::atomic<int> right{0};
  a().call("test", [&] {
    WaitGroup group;
    group.add(kFibers);
    for (int i = 0; i < kFibers; ++i) {
      a().spawn("thrower", [&, i] {
        try {
          try {
            throw std::runtime_error(std::to_string(i));
          } catch (...) {
            for (int n = 0; n < 1 + i % 3; ++n) EventLoop::current()->yield();
            throw;
          }
        } catch (const std::runtime_error& e) {
          if (e.what() == std::to_string(i)) ++right;
        }
        group.done();
      });
    }
    group.wait();
  });
  EXPECT_EQ(right, kFibers);
}

TEST_P(LoopTest, FilesAreReadAndWrittenAtOffsets) {
  char path[] = "/tmp/minivmm-loop-XXXXXX";
  const UniqueFd fd(::mkstemp(path));
  ::unlink(path);
  a().call("test", [&] {
    const std::string text = "hello, disk";
    EXPECT_EQ(io::write_at(fd.get(), SingleBuffer(text.data(), text.size()), 4096), 11);
    EXPECT_EQ(io::fsync(fd.get(), true), 0);
    char first[5];
    char rest[20] = {};
    const iovec iov[] = {{first, 5}, {rest, sizeof rest}};
    // Stops at the end of the file.
    EXPECT_EQ(io::read_at(fd.get(), IoSpan(std::span(iov)), 4096), 11);
    EXPECT_EQ(std::string(first, 5), "hello");
    EXPECT_EQ(std::string(rest), ", disk");
    EXPECT_EQ(io::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 5), 0);
    EXPECT_EQ(io::read_at(fd.get(), SingleBuffer(first, 5), 4096), 5);
    EXPECT_EQ(first[0], 0);
    EXPECT_EQ(io::read_at(-1, SingleBuffer(first, 5), 0), -EBADF);
  });
}

TEST_P(LoopTest, MoreOperationsThanTheRingHolds) {
#if defined(__SANITIZE_THREAD__)
  constexpr int kFibers = 600;  // TSan keeps megabytes for each fiber
#else
  constexpr int kFibers = 5000;
#endif
  int pair[2];
  ASSERT_EQ(::pipe2(pair, O_CLOEXEC), 0);
  const UniqueFd reader(pair[0]);
  const UniqueFd writer(pair[1]);
  std::atomic<int> ready{0};
  a().call("test", [&] {
    WaitGroup group;
    group.add(kFibers);
    for (int i = 0; i < kFibers; ++i) {
      a().spawn("poller", [&] {
        if (io::poll(reader.get(), POLLIN) > 0) ++ready;
        group.done();
      });
    }
    for (int i = 0; i < 3; ++i) a().yield();
    EXPECT_EQ(::write(writer.get(), "x", 1), 1);
    group.wait();
  });
  EXPECT_EQ(ready, kFibers);
}

TEST_P(LoopTest, CancelEndsWaits) {
  int pair[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
  const UniqueFd left(pair[0]);
  const UniqueFd right(pair[1]);
  a().call("test", [&] {
    CancelSource cancel;
    WaitGroup group;
    group.add(2);
    int64_t result = 0;
    bool slept = true;
    a().spawn_now("poll", [&] {
      result = io::poll(left.get(), POLLIN, &cancel);
      group.done();
    });
    a().spawn_now("sleep", [&] {
      slept = io::sleep_for(std::chrono::hours(1), &cancel);
      group.done();
    });
    io::sleep_for(milliseconds(5));
    cancel.cancel();
    group.wait();
    EXPECT_EQ(result, -ECANCELED);
    EXPECT_FALSE(slept);
    EXPECT_EQ(io::poll(left.get(), POLLIN, &cancel), -ECANCELED);
  });
}

// The eventfd is non-blocking, as KVM's users make them: a backend that spins on EAGAIN would
// still pass, one that gives up would not.
TEST_P(LoopTest, EventfdsAreWaitedForAndTaken) {
  const UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  std::thread poster([&] {
    std::this_thread::sleep_for(milliseconds(10));
    const uint64_t three = 3;
    EXPECT_EQ(::write(fd.get(), &three, sizeof three), 8);
  });
  EXPECT_EQ(a().call("test", [&] { return io::read_eventfd(fd.get()); }), 3);
  poster.join();
}

TEST_P(LoopTest, TimersFireInOrder) {
  std::vector<int> order;
  a().call("test", [&] {
    WaitGroup group;
    for (const int ms : {9, 3, 6}) {
      group.add();
      a().spawn("sleeper", [&, ms] {
        io::sleep_for(milliseconds(ms));
        order.push_back(ms);
        group.done();
      });
    }
    group.wait();
  });
  EXPECT_EQ(order, (std::vector<int>{3, 6, 9}));
}

TEST_P(LoopTest, PoolRunsClosuresAndCarriesErrorsBack) {
  a().call("test", [&] {
    Pool pool("test-pool", 2);
    const auto here = std::this_thread::get_id();
    EXPECT_NE(pool.run([] { return std::this_thread::get_id(); }), here);
    EXPECT_EQ(std::this_thread::get_id(), here);
    EXPECT_THROW(pool.run([] { throw Error(EPERM, "no"); }), Error);
    const auto named = [] { return 7; };
    EXPECT_EQ(pool.run(named), 7);
  });
}

TEST_P(LoopTest, PostsFromManyThreadsAllRun) {
#if defined(__SANITIZE_THREAD__)
  constexpr int kPosts = 100;  // TSan keeps megabytes for each fiber
#else
  constexpr int kPosts = 2000;
#endif
  std::atomic<int> ran{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < kPosts; ++i) a().post("posted", [&] { ++ran; });
    });
  }
  for (auto& thread : threads) thread.join();
  a().call("last", [] {});
  EXPECT_EQ(ran, 4 * kPosts);
}

TEST_P(LoopTest, DescribesWhatFibersWaitFor) {
  a().call("test", [&] {
    Event event;
    WaitGroup group;
    group.add();
    a().spawn_now("stuck", [&] {
      event.wait();
      group.done();
    });
    const auto lines = a().describe_fibers(10);
    ASSERT_FALSE(lines.empty());
    EXPECT_EQ(lines[0], "stuck: waiting for an event");
    event.set();
    group.wait();
  });
}

TEST(LoopGroup, RefusesSillyCounts) {
  EXPECT_THROW(LoopGroup(0), Error);
  EXPECT_THROW(LoopGroup(EventLoop::kMaxLoops + 1), Error);
}

// The loops that run already must be ended, not abandoned with their threads.
TEST(LoopGroup, WhereLoopsRunOutTheErrorIsThrownAndNothingIsLeft) {
  const LoopGroup some(EventLoop::kMaxLoops - 3, BackendChoice::kEpoll);
  EXPECT_THROW(LoopGroup(8, BackendChoice::kEpoll), Error);
  LoopGroup rest(3, BackendChoice::kEpoll);
  EXPECT_EQ(rest.loop(2).call("alive", [] { return 7; }), 7);
}

// Whether the loop looks by itself or has gone to sleep by then.
TEST_P(LoopTest, DescriptorsThatBecomeReadyLateOrSoonAreNoticed) {
  for (const int wait_us : {0, 10, 100, 20'000}) {
    for (unsigned i = 0; i < 5; ++i) {
      const UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      std::thread writer([&] {
        ::usleep(static_cast<useconds_t>(wait_us));
        const uint64_t one = 1;
        ASSERT_EQ(::write(fd.get(), &one, sizeof one), ssize_t{sizeof one});
      });
      EXPECT_EQ(a().call("test", [&] { return io::poll(fd.get(), POLLIN, nullptr); }), POLLIN);
      writer.join();
    }
  }
}

// Who waits for a body that never runs waits for ever: each is either run or refused.
TEST(EventLoopEnd, BodiesRunOrAreRefused) {
  for (unsigned round = 0; round < 10; ++round) {
    EventLoop loop;
    std::thread thread([&loop] { loop.run(); });
    std::atomic<unsigned> ran{0};
    unsigned taken = 0;
    std::thread poster([&] {
      while (taken < 200 && loop.post("test", [&ran] { ++ran; })) ++taken;
    });
    std::this_thread::yield();
    loop.stop();
    thread.join();
    poster.join();
    EXPECT_EQ(ran, taken);
    EXPECT_THROW(loop.call("test", [] {}), Error);
  }
}

}  // namespace
}  // namespace minivmm::base
