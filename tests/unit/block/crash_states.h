// SPDX-License-Identifier: Apache-2.0
// How many states that a crash could have left a test looks at: more by far where MINIVMM_SLOW=1
// says that there is time. The number is in the test's record (--gtest_output), to be added up.
#pragma once

#include <gtest/gtest.h>

#include "tests/support/slow.h"

namespace minivmm::block {

// Once a test. `in_ci`: without MINIVMM_SLOW.
inline unsigned crash_states(unsigned in_ci) {
  const unsigned states = slow_tests() ? in_ci * 10 : in_ci;
  testing::Test::RecordProperty("crash_states", static_cast<int>(states));
  return states;
}

}  // namespace minivmm::block
