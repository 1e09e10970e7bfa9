// SPDX-License-Identifier: Apache-2.0
#include "base/idle_spin.h"

#include <gtest/gtest.h>

namespace minivmm::base {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr auto kLimit = microseconds(50);

class IdleSpinTest : public ::testing::Test {
 protected:
  void SetUp() override { spin_.slept(microseconds(10)); }

  // One spin that gives way for `away`, as an event loop does it. False: it went to sleep instead.
  bool spin(std::chrono::nanoseconds away) {
    if (!spin_.begin(now_)) return false;
    const auto before = now_;
    now_ += away;
    spin_.gave_way(before, now_);
    spin_.spun(true);
    return true;
  }

  IdleSpin spin_{kLimit};
  IdleSpin::Clock::time_point now_{std::chrono::seconds(1000)};
};

TEST_F(IdleSpinTest, ShortSleepsEarnASpin) {
  IdleSpin fresh(kLimit);
  EXPECT_FALSE(fresh.begin(now_));
  fresh.slept(milliseconds(5));
  EXPECT_FALSE(fresh.begin(now_));
  fresh.slept(microseconds(60));
  EXPECT_TRUE(fresh.begin(now_));
  fresh.spun(true);
}

TEST_F(IdleSpinTest, FruitlessSpinsSpendTheCredit) {
  int spins = 0;
  while (spin_.begin(now_)) {
    spin_.spun(false);
    ASSERT_LT(++spins, 100);
  }
  EXPECT_GT(spins, 0);
}

TEST_F(IdleSpinTest, GivingWayToAClientGoesOn) {
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(spin(microseconds(300)));
}

// Each spin beside a thread that only computes costs a time slice: it must not happen at each
// batch of requests, however often the client has sent something meanwhile.
TEST_F(IdleSpinTest, ABusyNeighbourStopsIt) {
  EXPECT_TRUE(spin(milliseconds(3)));
  int spins = 0;
  const auto end = now_ + std::chrono::seconds(10);
  for (; now_ < end; now_ += microseconds(100)) spins += spin(milliseconds(3)) ? 1 : 0;
  EXPECT_GE(spins, 5);
  EXPECT_LE(spins, 20);
}

TEST_F(IdleSpinTest, ItComesBackWhenTheNeighbourIsGone) {
  EXPECT_TRUE(spin(milliseconds(3)));
  EXPECT_FALSE(spin(microseconds(1)));
  now_ += milliseconds(21);
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(spin(microseconds(1)));
  // A neighbour that comes by once in a while costs a short pause, not the long one.
  now_ += milliseconds(200);
  EXPECT_TRUE(spin(milliseconds(3)));
  now_ += milliseconds(21);
  EXPECT_TRUE(spin(microseconds(1)));
}

}  // namespace
}  // namespace minivmm::base
