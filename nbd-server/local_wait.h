// SPDX-License-Identifier: Apache-2.0
// One fiber waits for another of the same loop. No locks: all of it is one thread. The waiter
// re-checks its condition; a notification without a waiter is forgotten.
#pragma once

#include "base/event_loop.h"
#include "base/fiber.h"

namespace minivmm::nbd {

class LocalWait {
 public:
  // `why` is a literal for state dumps. At most one fiber waits at a time.
  void wait(const char* why) noexcept {
    waiter_ = base::Fiber::current();
    waiter_->waiting_for = why;
    waiter_->suspend();
  }
  void notify() noexcept {
    if (waiter_ == nullptr) return;
    base::Fiber& fiber = *waiter_;
    waiter_ = nullptr;
    fiber.loop().wake(fiber);
  }

 private:
  base::Fiber* waiter_ = nullptr;
};

}  // namespace minivmm::nbd
