// SPDX-License-Identifier: Apache-2.0
// Fiber stacks when there is no memory for one.
#include "base/stack_pool.h"

#include <sys/resource.h>

#include <cstdlib>
#include <new>

#include <gtest/gtest.h>

namespace minivmm::base {
namespace {

// Sanitizers need address space of their own at any time, so the test is not for their builds.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
// Front ends answer std::bad_alloc with an error for the one request. Any other exception would
// pass them by, out of functions that must not throw.
TEST(StackPool, NoRoomForAStackIsNoMemory) {
  const auto take_without_room = [] {
    StackPool pool;
    const Stack first = pool.take();
    const rlimit none{0, 0};
    if (::setrlimit(RLIMIT_AS, &none) != 0) std::_Exit(2);
    try {
      (void)pool.take();
    } catch (const std::bad_alloc&) {
      pool.give_back(first);
      std::_Exit(pool.take().bottom == first.bottom ? 0 : 3);
    } catch (...) {
      std::_Exit(4);
    }
    std::_Exit(5);
  };
  EXPECT_EXIT(take_without_room(), testing::ExitedWithCode(0), "");
}
#endif

TEST(StackPool, WhatIsGivenBackIsTakenAgain) {
  StackPool pool;
  const Stack first = pool.take();
  pool.give_back(first);
  EXPECT_EQ(pool.idle(), 1U);
  const Stack second = pool.take();
  EXPECT_EQ(second.bottom, first.bottom);
  pool.give_back(second);
  pool.trim(0);
  EXPECT_EQ(pool.idle(), 0U);
}

}  // namespace
}  // namespace minivmm::base
