// SPDX-License-Identifier: Apache-2.0
// The fibers of a job on every loop of a group: started together, ended together, with one error.
//
// Owned by the job, used by one fiber (run) and any thread (stop).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>

#include "base/error.h"
#include "base/loop_group.h"
#include "base/sync.h"

namespace minivmm::block {

class WorkerGroup {
 public:
  // Runs `work` on `count` fibers spread over the loops, and returns when all have ended. `work`
  // ends where stopped() says so. Throws the error that was reported for the lowest offset.
  // Fiber of one of the loops; once.
  void run(base::LoopGroup& loops, unsigned count, const std::function<void()>& work);

  // Asks for an early end. Any thread, also from a signal handler.
  void stop() noexcept { stopped_.store(true, std::memory_order_release); }
  bool stopped() const noexcept { return stopped_.load(std::memory_order_acquire); }

  // Called in a catch block of a worker: keeps the error and stops the others.
  void failed(uint64_t offset) noexcept;

 private:
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  // Not the exception itself: that is its worker's loop's.
  std::optional<base::Error> error_;  // guarded by mutex_
  uint64_t error_at_ = ~uint64_t{0};  // guarded by mutex_
  base::WaitGroup running_;
};

}  // namespace minivmm::block
