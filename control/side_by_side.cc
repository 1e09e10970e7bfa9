// SPDX-License-Identifier: Apache-2.0
#include "control/side_by_side.h"

#include <exception>
#include <thread>

namespace minivmm::control {

void run_side_by_side(const std::vector<std::function<void()>>& works) {
  std::vector<std::thread> threads;
  threads.reserve(works.size());
  for (const std::function<void()>& work : works) {
    try {
      threads.emplace_back(work);
    } catch (const std::exception&) {  // no thread, or no memory for one
      work();
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace minivmm::control
