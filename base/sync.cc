// SPDX-License-Identifier: Apache-2.0
#include "base/sync.h"

namespace minivmm::base {

void FiberMutex::lock() {
  std::unique_lock lock(mutex_);
  if (!held_ && waiters_.empty() && handed_over_ == 0) {
    held_ = true;
    return;
  }
  // unlock() hands the mutex over, so that a newcomer cannot take it before us.
  waiters_.wait(lock, "a lock");
  --handed_over_;
}

bool FiberMutex::try_lock() {
  const std::lock_guard lock(mutex_);
  if (held_) return false;
  held_ = true;
  return true;
}

void FiberMutex::unlock() noexcept {
  const std::lock_guard lock(mutex_);
  if (waiters_.empty()) {
    held_ = false;
    return;
  }
  ++handed_over_;  // still held, by the one that is woken
  waiters_.notify_one();
}

void FiberSharedMutex::lock() {
  std::unique_lock lock(mutex_);
  ++waiting_writers_;
  while (writing_ || active_readers_ != 0) writers_.wait(lock, "a write lock");
  --waiting_writers_;
  writing_ = true;
}

void FiberSharedMutex::unlock() noexcept {
  const std::lock_guard lock(mutex_);
  writing_ = false;
  if (waiting_writers_ != 0) {
    writers_.notify_one();
  } else {
    readers_.notify_all();
  }
}

void FiberSharedMutex::lock_shared() {
  std::unique_lock lock(mutex_);
  while (writing_ || waiting_writers_ != 0) readers_.wait(lock, "a read lock");
  ++active_readers_;
}

void FiberSharedMutex::unlock_shared() noexcept {
  const std::lock_guard lock(mutex_);
  if (--active_readers_ != 0) return;
  if (waiting_writers_ != 0) {
    writers_.notify_one();
  } else {
    readers_.notify_all();
  }
}

void Semaphore::acquire(uint64_t units) {
  std::unique_lock lock(mutex_);
  if (wanted_.empty() && free_ >= units) {
    free_ -= units;
    return;
  }
  wanted_.push_back(units);
  // Woken only by release(), which has taken our units off already.
  waiters_.wait(lock, "a free slot");
}

bool Semaphore::try_acquire(uint64_t units) {
  const std::lock_guard lock(mutex_);
  if (!wanted_.empty() || free_ < units) return false;
  free_ -= units;
  return true;
}

void Semaphore::release(uint64_t units) noexcept {
  const std::lock_guard lock(mutex_);
  free_ += units;
  while (!wanted_.empty() && free_ >= wanted_.front()) {
    free_ -= wanted_.front();
    wanted_.pop_front();
    waiters_.notify_one();
  }
}

uint64_t Semaphore::available() const {
  const std::lock_guard lock(mutex_);
  return free_;
}

bool Gate::enter() {
  const std::lock_guard lock(mutex_);
  if (closed_) return false;
  ++inside_;
  return true;
}

void Gate::leave() noexcept {
  const std::lock_guard lock(mutex_);
  if (--inside_ == 0) waiters_.notify_all();
}

void Gate::close() {
  std::unique_lock lock(mutex_);
  closed_ = true;
  while (inside_ != 0) waiters_.wait(lock, "a gate to empty");
}

bool Gate::close_until(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  closed_ = true;
  while (inside_ != 0) {
    if (!waiters_.wait_until(lock, deadline, "a gate to empty")) return inside_ == 0;
  }
  return true;
}

bool Gate::closed() const {
  const std::lock_guard lock(mutex_);
  return closed_;
}

uint64_t Gate::inside() const {
  const std::lock_guard lock(mutex_);
  return inside_;
}

void Event::set() {
  const std::lock_guard lock(mutex_);
  set_ = true;
  waiters_.notify_all();
}

void Event::reset() {
  const std::lock_guard lock(mutex_);
  set_ = false;
}

bool Event::is_set() const {
  const std::lock_guard lock(mutex_);
  return set_;
}

void Event::wait() {
  std::unique_lock lock(mutex_);
  while (!set_) waiters_.wait(lock, "an event");
}

bool Event::wait_until(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  while (!set_) {
    if (!waiters_.wait_until(lock, deadline, "an event")) return set_;
  }
  return true;
}

void WaitGroup::add(uint64_t n) {
  const std::lock_guard lock(mutex_);
  running_ += n;
}

void WaitGroup::done() noexcept {
  const std::lock_guard lock(mutex_);
  if (--running_ == 0) waiters_.notify_all();
}

void WaitGroup::wait() {
  std::unique_lock lock(mutex_);
  while (running_ != 0) waiters_.wait(lock, "fibers to end");
}

}  // namespace minivmm::base
