// SPDX-License-Identifier: Apache-2.0
// What one system call of each kind costs on this machine: the numbers that decide how a server
// should batch. Each cost is taken in many short slices; the least slice is the cost without the
// machine's other load, the median tells how loaded it was.
#pragma once

#include <string>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "clock.h"

namespace minivmm::bench {

struct CostOptions {
  std::string file;          // page-cached scratch file; made and removed by the tool
  unsigned slices = 61;      // measurements of each cost
  double slice_ms = 8;       // length of one
  std::uint64_t blocks = 0;  // 4 KiB blocks in the file
};

// Runs `fn` (which does `ops` operations) repeatedly and prints ns per operation.
template <typename Fn>
void cost(const CostOptions& o, const char* what, double ops, Fn&& fn) {
  const auto timed = [&](std::uint64_t rounds) {
    const std::uint64_t start = now_ns();
    for (std::uint64_t i = 0; i < rounds; ++i) fn();
    return static_cast<double>(now_ns() - start);
  };
  const double once = std::max(timed(20) / 20, 1.0);
  const auto rounds = static_cast<std::uint64_t>(std::max(1.0, o.slice_ms * 1e6 / once));
  std::vector<double> ns;
  for (unsigned i = 0; i < o.slices; ++i) {
    ns.push_back(timed(rounds) / (static_cast<double>(rounds) * ops));
  }
  std::sort(ns.begin(), ns.end());
  std::printf("%-64s %9.0f %9.0f %9.0f\n", what, ns.front(), ns[ns.size() / 2],
              ns[ns.size() * 9 / 10]);
  std::fflush(stdout);
}

// Wakes and messages between two threads (syscall_cost_threads.cc).
void thread_costs(const CostOptions& o);

}  // namespace minivmm::bench
