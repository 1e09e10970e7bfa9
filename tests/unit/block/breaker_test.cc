// SPDX-License-Identifier: Apache-2.0
// When calls are sent away from a loop's thread: after one that slept, not after one that merely
// took long because the CPU was busy.
#include "block/protocols/breaker.h"

#include <chrono>
#include <thread>

#include <gtest/gtest.h>

namespace minivmm::block {
namespace {

using std::chrono::milliseconds;

void sleep_in(Breaker& breaker) {
  const Breaker::Call call(breaker);
  std::this_thread::sleep_for(milliseconds(25));
}

void compute_in(Breaker& breaker) {
  const Breaker::Call call(breaker);
  const auto end = std::chrono::steady_clock::now() + milliseconds(25);
  while (std::chrono::steady_clock::now() < end) {
  }
}

TEST(Breaker, OpensForAWhileAfterCallsThatSleep) {
  Breaker breaker;
  EXPECT_TRUE(breaker.allows_inline());
  sleep_in(breaker);
  EXPECT_TRUE(breaker.allows_inline()) << "a single long call may have lost the CPU";
  sleep_in(breaker);
  EXPECT_FALSE(breaker.allows_inline());
  std::this_thread::sleep_for(milliseconds(250));
  EXPECT_TRUE(breaker.allows_inline());
}

TEST(Breaker, StaysClosedWhereCallsAreLongWithoutSleeping) {
  Breaker breaker;
  for (int i = 0; i < 4; ++i) {
    compute_in(breaker);
    EXPECT_TRUE(breaker.allows_inline());
  }
}

TEST(Breaker, StaysClosedForShortCalls) {
  Breaker breaker;
  sleep_in(breaker);
  for (int i = 0; i < 4; ++i) const Breaker::Call call(breaker);
  EXPECT_TRUE(breaker.allows_inline());
}

}  // namespace
}  // namespace minivmm::block
