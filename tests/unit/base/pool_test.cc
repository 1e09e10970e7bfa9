// SPDX-License-Identifier: Apache-2.0
// The threads for what blocks.
#include "base/pool.h"

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace minivmm::base {
namespace {

using std::chrono::seconds;

struct Job : Pool::Task {
  explicit Job(std::function<void()> w) : work(std::move(w)) {
    run = [](Task& task) noexcept { static_cast<Job&>(task).work(); };
  }
  std::function<void()> work;
};

// Two tasks come while one thread is idle and has not woken yet: the second must not stand behind
// the first, which waits for it.
TEST(Pool, ATaskDoesNotWaitBehindOneThatBlocksWhileThreadsAreAllowed) {
  for (int round = 0; round < 20; ++round) {
    std::promise<void> warm;
    std::promise<void> second_ran;
    std::promise<bool> first_saw_it;
    Job first([&] {
      first_saw_it.set_value(second_ran.get_future().wait_for(seconds(5)) ==
                             std::future_status::ready);
    });
    Job warm_up([&] { warm.set_value(); });
    Job second([&] { second_ran.set_value(); });
    Pool pool("test", 2);  // ends before the jobs do
    pool.submit(warm_up);
    warm.get_future().wait();
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // its thread is idle now
    pool.submit(first);
    pool.submit(second);
    ASSERT_TRUE(first_saw_it.get_future().get()) << "round " << round;
  }
}

TEST(Pool, NeverMoreThreadsThanAllowedAndEveryTaskRuns) {
  std::atomic<int> inside{0};
  std::atomic<int> most{0};
  std::atomic<int> ran{0};
  const auto work = [&] {
    const int now = ++inside;
    int seen = most.load();
    while (seen < now && !most.compare_exchange_weak(seen, now)) {
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    --inside;
    ++ran;
  };
  std::vector<std::unique_ptr<Job>> jobs;
  {
    Pool pool("test", 3);
    for (int i = 0; i < 500; ++i) {
      jobs.push_back(std::make_unique<Job>(work));
      pool.submit(*jobs.back());
    }
  }  // what was submitted is done before the threads end
  EXPECT_EQ(ran, 500);
  EXPECT_LE(most, 3);
}

}  // namespace
}  // namespace minivmm::base
