// SPDX-License-Identifier: Apache-2.0
#include "base/loop_group.h"

#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::base {

LoopGroup::LoopGroup(unsigned count, BackendChoice backend) {
  if (count == 0 || count > EventLoop::kMaxLoops) {
    throw Error(EINVAL,
                fmt::format("{} I/O threads: 1 to {} are possible", count, EventLoop::kMaxLoops));
  }
  try {
    std::vector<std::future<void>> started;
    for (unsigned i = 0; i < count; ++i) started.push_back(start_loop(i, backend));
    for (auto& future : started) future.get();
  } catch (...) {
    stop();
    throw;
  }
}

LoopGroup::~LoopGroup() { stop(); }

std::future<void> LoopGroup::start_loop(unsigned number, BackendChoice backend) {
  loops_.push_back(std::make_unique<EventLoop>(
      EventLoopOptions{.name = fmt::format("io-{}", number), .backend = backend}));
  auto promise = std::make_shared<std::promise<void>>();
  std::future<void> started = promise->get_future();
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
  return started;
}

// Loops whose thread could not be made are only destroyed.
void LoopGroup::stop() noexcept {
  for (auto& loop : loops_) loop->stop();
  for (auto& thread : threads_) {
    if (thread.joinable()) thread.join();
  }
}

}  // namespace minivmm::base
