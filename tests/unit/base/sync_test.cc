// SPDX-License-Identifier: Apache-2.0
// The locks of fibers, across two loops.
#include "base/sync.h"

#include <atomic>
#include <vector>

#include <gtest/gtest.h>

#include "base/epoch.h"
#include "base/event_loop.h"
#include "base/io.h"
#include "base/loop_group.h"

namespace minivmm::base {
namespace {

using std::chrono::milliseconds;

class SyncTest : public testing::Test {
 protected:
  // Runs `body(i)` as n fibers spread over two loops and waits for all.
  template <typename Body>
  void run_fibers(int n, Body body) {
    loops_.loop(0).call("test", [&] {
      WaitGroup group;
      group.add(static_cast<uint64_t>(n));
      for (int i = 0; i < n; ++i) {
        loops_.loop(static_cast<size_t>(i) % 2).post("fiber", [&group, &body, i] {
          body(i);
          group.done();
        });
      }
      group.wait();
    });
  }
  LoopGroup loops_{2};
};

TEST_F(SyncTest, MutexExcludesAcrossLoopsAndSuspensions) {
  FiberMutex mutex;
  int inside = 0;
  int most = 0;
  int total = 0;
  run_fibers(100, [&](int) {
    for (int n = 0; n < 20; ++n) {
      const std::lock_guard lock(mutex);
      most = std::max(most, ++inside);
      EventLoop::current()->yield();
      --inside;
      ++total;
    }
  });
  EXPECT_EQ(most, 1);
  EXPECT_EQ(total, 2000);
}

TEST_F(SyncTest, SharedMutexLetsReadersInTogetherAndWritersAlone) {
  FiberSharedMutex mutex;
  std::atomic<int> readers{0};
  std::atomic<int> most_readers{0};
  std::atomic<bool> writing{false};
  std::atomic<bool> broken{false};
  run_fibers(60, [&](int i) {
    for (int n = 0; n < 20; ++n) {
      if (i % 6 == 0) {
        mutex.lock();
        if (writing.exchange(true) || readers != 0) broken = true;
        EventLoop::current()->yield();
        writing = false;
        mutex.unlock();
      } else {
        mutex.lock_shared();
        const int now = ++readers;
        if (writing) broken = true;
        int seen = most_readers;
        while (seen < now && !most_readers.compare_exchange_weak(seen, now)) {
        }
        EventLoop::current()->yield();
        --readers;
        mutex.unlock_shared();
      }
    }
  });
  EXPECT_FALSE(broken);
  EXPECT_GT(most_readers, 1);
}

TEST_F(SyncTest, SemaphoreBoundsAndServesLargeRequestsInTurn) {
  Semaphore semaphore(10);
  std::atomic<int> used{0};
  std::atomic<bool> over{false};
  run_fibers(40, [&](int i) {
    const uint64_t units = i % 7 == 0 ? 10 : 1 + static_cast<uint64_t>(i) % 3;
    for (int n = 0; n < 20; ++n) {
      semaphore.acquire(units);
      if ((used += static_cast<int>(units)) > 10) over = true;
      EventLoop::current()->yield();
      used -= static_cast<int>(units);
      semaphore.release(units);
    }
  });
  EXPECT_FALSE(over);
  EXPECT_EQ(semaphore.available(), 10U);
}

TEST_F(SyncTest, GateRefusesAfterCloseAndWaitsForThoseInside) {
  Gate gate;
  loops_.loop(0).call("test", [&] {
    ASSERT_TRUE(gate.enter());
    EXPECT_FALSE(gate.close_until(Clock::now() + milliseconds(2)));
    EXPECT_FALSE(gate.enter());
    loops_.loop(1).post("leaver", [&] { gate.leave(); });
    gate.close();
    EXPECT_EQ(gate.inside(), 0U);
  });
}

TEST_F(SyncTest, TimedWaitEndsByTimeOrBySetButNotBoth) {
  for (int round = 0; round < 200; ++round) {
    Event event;
    loops_.loop(0).call("test", [&] {
      // Aimed at the same moment from another thread.
      loops_.loop(1).post("setter", [&] {
        io::sleep_for(std::chrono::microseconds(round % 100));
        event.set();
      });
      (void)event.wait_until(Clock::now() + std::chrono::microseconds(50));
      event.wait();
    });
    loops_.loop(1).call("settle", [] {});
  }
}

TEST_F(SyncTest, EpochWaitsForOlderPinsOnly) {
  Epoch epoch;
  std::atomic<bool> synchronized{false};
  loops_.loop(0).call("test", [&] {
    Epoch::Pin old(epoch);
    WaitGroup group;
    group.add();
    loops_.loop(1).post("sync", [&] {
      epoch.synchronize();
      synchronized = true;
      group.done();
    });
    io::sleep_for(milliseconds(5));
    EXPECT_FALSE(synchronized);
    const Epoch::Pin younger(epoch);  // held throughout: must not delay it
    old.release();
    group.wait();
    EXPECT_TRUE(synchronized);
    EXPECT_EQ(epoch.in_flight(), 1U);
  });
}

TEST_F(SyncTest, EpochTimesOutAndStillWaitsForThatPinLater) {
  Epoch epoch;
  loops_.loop(0).call("test", [&] {
    auto pin = std::make_unique<Epoch::Pin>(epoch);
    EXPECT_FALSE(epoch.synchronize_until(Clock::now() + milliseconds(2)));
    EXPECT_FALSE(epoch.synchronize_until(Clock::now() + milliseconds(2)));
    pin.reset();
    EXPECT_TRUE(epoch.synchronize_until(Clock::now() + milliseconds(100)));
  });
}

// A handle that closes over a request that hangs must not make a drain hang, which has a deadline.
TEST_F(SyncTest, EpochKeepsADeadlineWhileAnotherCallWaitsWithoutOne) {
  Epoch epoch;
  loops_.loop(0).call("test", [&] {
    Epoch::Pin stuck(epoch);
    WaitGroup group;
    group.add();
    loops_.loop(1).post("close", [&] {
      epoch.synchronize();
      group.done();
    });
    io::sleep_for(milliseconds(5));
    std::atomic<bool> given_up{false};
    group.add();
    loops_.loop(1).post("drain", [&] {
      EXPECT_FALSE(epoch.synchronize_until(Clock::now() + milliseconds(5)));
      given_up = true;
      group.done();
    });
    for (int i = 0; i < 2000 && !given_up; ++i) io::sleep_for(milliseconds(1));
    EXPECT_TRUE(given_up);
    stuck.release();
    group.wait();
  });
}

// Whoever saw that nothing is in flight may destroy the epoch, while the last one to leave is still
// on its way out. (What would break is seen by ASan and TSan.)
TEST_F(SyncTest, EpochMayBeDestroyedAsSoonAsNothingIsInFlight) {
  for (int i = 0; i < 500; ++i) {
    auto epoch = std::make_unique<Epoch>();
    std::atomic<bool> entered{false};
    loops_.loop(1).post("request", [&] {
      Epoch::Pin pin(*epoch);
      entered.store(true, std::memory_order_relaxed);
      while (entered.load(std::memory_order_relaxed)) {  // until the other side looks
      }
      pin.release();
    });
    loops_.loop(0).call("close", [&] {
      while (!entered.load(std::memory_order_relaxed)) EventLoop::current()->yield();
      entered.store(false, std::memory_order_relaxed);
      while (epoch->in_flight() != 0) EventLoop::current()->yield();
      epoch->synchronize();
      epoch.reset();
    });
    loops_.loop(1).call("settle", [] {});
  }
}

// What the quarantine of freed clusters rests on: nothing pinned before synchronize() may still
// be using what was retired before it.
TEST_F(SyncTest, EpochProtectsRetiredObjectsUnderLoad) {
  Epoch epoch;
  std::atomic<int*> shared{new int(1)};
  std::atomic<bool> used_after_free{false};
  run_fibers(16, [&](int i) {
    for (int n = 0; n < 100; ++n) {
      if (i == 0) {
        int* old = shared.exchange(new int(1));
        epoch.synchronize();
        *old = 0;  // "freed": a reader that still has it sees the mark
        delete old;
      } else {
        const Epoch::Pin pin(epoch);
        const int* p = shared.load();
        EventLoop::current()->yield();
        if (*p != 1) used_after_free = true;
      }
    }
  });
  delete shared.load();
  EXPECT_FALSE(used_after_free);
}

}  // namespace
}  // namespace minivmm::base
