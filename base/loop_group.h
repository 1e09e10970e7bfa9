// SPDX-License-Identifier: Apache-2.0
// The I/O threads of the process: N event loops, each on a thread of its own. Owned by main (or a
// test); the destructor stops the loops, waits for their last fibers and joins.
#pragma once

#include <atomic>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "base/event_loop.h"

namespace minivmm::base {

class LoopGroup {
 public:
  // `count` from 1 to EventLoop::kMaxLoops. Returns when every loop runs; throws what a loop threw
  // while starting (an io_uring that was asked for and is refused, no more loops or threads to be
  // had). Nothing runs then.
  explicit LoopGroup(unsigned count, BackendChoice backend = BackendChoice::kAuto);
  ~LoopGroup();

  size_t size() const noexcept { return loops_.size(); }
  EventLoop& loop(size_t i) noexcept { return *loops_[i]; }
  // The loops in turn, for spreading connections and queues. Any thread.
  EventLoop& next() noexcept {
    return *loops_[turn_.fetch_add(1, std::memory_order_relaxed) % loops_.size()];
  }

 private:
  std::future<void> start_loop(unsigned number, BackendChoice backend);
  void stop() noexcept;

  std::vector<std::unique_ptr<EventLoop>> loops_;
  std::vector<std::thread> threads_;
  std::atomic<size_t> turn_{0};
};

}  // namespace minivmm::base
