// SPDX-License-Identifier: Apache-2.0
#include "base/wait_queue.h"

#include <cassert>

#include "base/event_loop.h"

namespace minivmm::base {

// On the waiting fiber's stack. `queue` is guarded by the user's mutex; it is null once notified.
struct WaitQueue::Waiter {
  Fiber* fiber = nullptr;
  WaitQueue* queue = nullptr;
  Waiter* prev = nullptr;
  Waiter* next = nullptr;
};

void WaitQueue::link(Waiter& waiter) noexcept {
  waiter.queue = this;
  waiter.prev = tail_;
  waiter.next = nullptr;
  (tail_ != nullptr ? tail_->next : head_) = &waiter;
  tail_ = &waiter;
}

void WaitQueue::unlink(Waiter& waiter) noexcept {
  (waiter.prev != nullptr ? waiter.prev->next : head_) = waiter.next;
  (waiter.next != nullptr ? waiter.next->prev : tail_) = waiter.prev;
  waiter.queue = nullptr;
}

void WaitQueue::wait(std::unique_lock<std::mutex>& lock, const char* why) {
  Waiter waiter;
  waiter.fiber = Fiber::current();
  assert(waiter.fiber != nullptr && "only fibers may wait");
  link(waiter);
  waiter.fiber->waiting_for = why;
  lock.unlock();
  waiter.fiber->suspend();
  lock.lock();
}

bool WaitQueue::wait_until(std::unique_lock<std::mutex>& lock, Clock::time_point deadline,
                           const char* why) {
  struct Timed : Waiter {
    std::mutex* mutex = nullptr;
    bool timed_out = false;
  };
  Timed waiter;
  waiter.fiber = Fiber::current();
  waiter.mutex = lock.mutex();
  assert(waiter.fiber != nullptr && "only fibers may wait");
  // Notified and timed out are decided under the user's mutex: exactly one of them wakes.
  Timer timer(
      [](void* argument) noexcept {
        auto& self = *static_cast<Timed*>(argument);
        const std::lock_guard guard(*self.mutex);
        if (self.queue == nullptr) return;
        self.queue->unlink(self);
        self.timed_out = true;
        self.fiber->loop().wake(*self.fiber);
      },
      &waiter);
  EventLoop& loop = waiter.fiber->loop();
  loop.timers().arm(timer, deadline);
  link(waiter);
  waiter.fiber->waiting_for = why;
  lock.unlock();
  waiter.fiber->suspend();
  loop.timers().disarm(timer);
  lock.lock();
  return !waiter.timed_out;
}

void WaitQueue::notify_one() noexcept {
  if (head_ == nullptr) return;
  Waiter& waiter = *head_;
  Fiber& fiber = *waiter.fiber;
  unlink(waiter);
  fiber.loop().wake(fiber);
}

void WaitQueue::notify_all() noexcept {
  while (head_ != nullptr) notify_one();
}

}  // namespace minivmm::base
