// SPDX-License-Identifier: Apache-2.0
// Whether there is time for a test's full counts: `./run-tests --slow` sets MINIVMM_SLOW to 1,
// other runs set it to 0.
#pragma once

#include <string_view>

#include <cstdlib>

namespace minivmm {

inline bool slow_tests() {
  const char* const value = std::getenv("MINIVMM_SLOW");
  return value != nullptr && std::string_view(value) == "1";
}

}  // namespace minivmm
