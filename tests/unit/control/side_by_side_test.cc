// SPDX-License-Identifier: Apache-2.0
#include "control/side_by_side.h"

#include <atomic>
#include <barrier>

#include <gtest/gtest.h>

namespace minivmm::control {
namespace {

// Each waits for all the others: one after another they would wait for ever.
TEST(SideBySide, RunsAllAtOnceAndWaitsForTheLast) {
  constexpr int kWorks = 5;
  std::barrier meeting(kWorks);
  std::atomic<int> ended{0};
  std::vector<std::function<void()>> works;
  for (int i = 0; i < kWorks; ++i) {
    works.emplace_back([&] {
      meeting.arrive_and_wait();
      ++ended;
    });
  }
  run_side_by_side(works);
  EXPECT_EQ(ended, kWorks);
  run_side_by_side({});
}

}  // namespace
}  // namespace minivmm::control
