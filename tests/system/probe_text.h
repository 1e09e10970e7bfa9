// SPDX-License-Identifier: Apache-2.0
// Reads what the probe guest prints: "probe: NAME ok key=value ...".
#pragma once

#include <string>

#include <cstdint>
#include <vector>

namespace minivmm::test {

struct ProbeLine {
  std::string text;
  bool ok = false;

  // Value of a key; "" if it is not there. Quotes are taken off.
  std::string value(const std::string& key) const;
  uint64_t number(const std::string& key) const;  // 0 if it is not there
};

// The result lines of jobs of this name, in order.
std::vector<ProbeLine> results(const std::string& output, const std::string& job);

}  // namespace minivmm::test
