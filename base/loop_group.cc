// SPDX-License-Identifier: Apache-2.0
#include "base/loop_group.h"

#include <algorithm>
#include <cerrno>
#include <future>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::base {

LoopGroup::LoopGroup(unsigned count, BackendChoice backend) {
  if (count == 0 || count > EventLoop::kMaxLoops) {
    throw Error(EINVAL,
                fmt::format("{} I/O threads: 1 to {} are possible", count, EventLoop::kMaxLoops));
  }
  std::vector<std::future<void>> started;
  for (unsigned i = 0; i < count; ++i) {
    loops_.push_back(std::make_unique<EventLoop>(
        EventLoopOptions{.name = fmt::format("io-{}", i), .backend = backend}));
    auto promise = std::make_shared<std::promise<void>>();
    started.push_back(promise->get_future());
    EventLoop& loop = *loops_.back();
    // set_value by the first fiber: then the loop is known to run.
    loop.post("start", [promise] { promise->set_value(); });
    threads_.emplace_back([&loop, promise] {
      try {
        loop.run();
      } catch (...) {
        promise->set_exception(std::current_exception());
      }
    });
  }
  std::exception_ptr error;
  for (auto& future : started) {
    try {
      future.get();
    } catch (...) {
      error = std::current_exception();
    }
  }
  if (error) {
    for (auto& loop : loops_) loop->stop();
    for (auto& thread : threads_) thread.join();
    std::rethrow_exception(error);
  }
}

LoopGroup::~LoopGroup() {
  for (auto& loop : loops_) loop->stop();
  for (auto& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

}  // namespace minivmm::base
