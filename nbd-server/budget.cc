// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/budget.h"

#include <algorithm>

#include "base/event_loop.h"
#include "base/fiber.h"

namespace minivmm::nbd {

// On the waiting fiber's stack. Linked until it is granted or cancelled; both are decided under
// the mutex, and whoever unlinks it wakes its fiber.
struct Budget::Waiter {
  Budget* budget = nullptr;
  base::Fiber* fiber = nullptr;
  uint64_t bytes = 0;
  bool linked = false;
  bool granted = false;
  Waiter* prev = nullptr;
  Waiter* next = nullptr;
};

uint64_t Budget::used() const noexcept {
  const std::lock_guard lock(mutex_);
  return used_;
}

// Under mutex_, as the next one: what requests may use.
uint64_t Budget::open() const noexcept {
  const uint64_t least = total_ / 4;
  return aside_ < total_ - least ? total_ - aside_ : least;
}

bool Budget::fits(uint64_t bytes) const noexcept {
  if (used_ + bytes <= open()) return true;
  return used_ <= total_ / 4 && used_ + bytes <= total_;
}

uint64_t Budget::spare() const noexcept {
  uint64_t out = 0;
  {
    const std::lock_guard lock(mutex_);
    const uint64_t kept = used_ + total_ / 4;
    out = open() > kept ? open() - kept : 0;
  }
  return above_ != nullptr ? std::min(out, above_->spare()) : out;
}

bool Budget::try_acquire_own(uint64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  if (head_ != nullptr || !fits(bytes)) return false;
  used_ += bytes;
  return true;
}

bool Budget::try_acquire_spare_own(uint64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  if (head_ != nullptr || used_ + bytes > open() / 4) return false;
  used_ += bytes;
  return true;
}

bool Budget::try_acquire(uint64_t bytes) noexcept {
  if (!try_acquire_own(bytes)) return false;
  if (above_ == nullptr || above_->try_acquire(bytes)) return true;
  release_own(bytes);
  return false;
}

bool Budget::try_acquire_spare(uint64_t bytes) noexcept {
  if (!try_acquire_spare_own(bytes)) return false;
  if (above_ == nullptr || above_->try_acquire_spare(bytes)) return true;
  release_own(bytes);
  return false;
}

// First here, then above: who waits there holds only what nobody there waits for.
bool Budget::acquire(uint64_t bytes, base::CancelSource& cancel) {
  if (!acquire_own(bytes, cancel)) return false;
  if (above_ == nullptr || above_->acquire(bytes, cancel)) return true;
  release_own(bytes);
  return false;
}

void Budget::release(uint64_t bytes) noexcept {
  if (above_ != nullptr) above_->release(bytes);
  release_own(bytes);
}

void Budget::unlink(Waiter& waiter) noexcept {
  (waiter.prev != nullptr ? waiter.prev->next : head_) = waiter.next;
  (waiter.next != nullptr ? waiter.next->prev : tail_) = waiter.prev;
  waiter.linked = false;
  waiting_.fetch_sub(1, std::memory_order_relaxed);
}

bool Budget::acquire_own(uint64_t bytes, base::CancelSource& cancel) {
  if (cancel.cancelled()) return false;
  Waiter waiter;
  waiter.budget = this;
  waiter.fiber = base::Fiber::current();
  waiter.bytes = bytes;
  {
    const std::lock_guard lock(mutex_);
    if (head_ == nullptr && fits(bytes)) {
      used_ += bytes;
      return true;
    }
    waiter.prev = tail_;
    (tail_ != nullptr ? tail_->next : head_) = &waiter;
    tail_ = &waiter;
    waiter.linked = true;
    waiting_.fetch_add(1, std::memory_order_relaxed);
  }
  const base::CancelSource::Registration registration(
      &cancel,
      [](void* argument) noexcept {
        auto& self = *static_cast<Waiter*>(argument);
        const std::lock_guard lock(self.budget->mutex_);
        if (!self.linked) return;
        self.budget->unlink(self);
        self.fiber->loop().wake(*self.fiber);
      },
      &waiter);
  waiter.fiber->waiting_for = "memory for a request";
  waiter.fiber->suspend();
  if (!waiter.granted) release_own(0);  // those behind a large request that gave up may fit now
  return waiter.granted;
}

void Budget::release_own(uint64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  used_ -= bytes;
  grant();
}

void Budget::set_aside(uint64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  aside_ += bytes;
}

void Budget::put_back(uint64_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  aside_ -= bytes;
  grant();
}

uint64_t Budget::set_aside() const noexcept {
  const std::lock_guard lock(mutex_);
  return aside_;
}

// Under mutex_.
void Budget::grant() noexcept {
  while (head_ != nullptr && fits(head_->bytes)) {
    Waiter& waiter = *head_;
    used_ += waiter.bytes;
    unlink(waiter);
    waiter.granted = true;
    waiter.fiber->loop().wake(*waiter.fiber);
  }
}

bool Account::try_take(uint64_t bytes) noexcept {
  if (used_ + bytes > limit_) return false;
  if (used_ + bytes > leased_) {
    const uint64_t missing = used_ + bytes - leased_;
    const uint64_t step = std::min(std::max(missing, kStep), limit_ - leased_);
    if (budgets_.open().try_acquire(step)) {
      leased_ += step;
    } else if (budgets_.open().try_acquire(missing)) {
      leased_ += missing;
    } else if (bytes <= Budgets::kSmall && budgets_.kept().try_acquire(missing)) {
      leased_ += missing;
      from_kept_ += missing;
    } else {
      return false;
    }
  }
  used_ += bytes;
  return true;
}

bool Account::wait(uint64_t bytes, base::CancelSource& cancel) {
  settle();
  const bool small = bytes <= Budgets::kSmall;
  if (!(small ? budgets_.kept() : budgets_.open()).acquire(bytes, cancel)) return false;
  if (small) from_kept_ += bytes;
  leased_ += bytes;
  used_ += bytes;
  return true;
}

// The kept share comes back first: bytes are bytes, and others may have nothing else to wait for.
void Account::settle() noexcept {
  const uint64_t spare = leased_ - used_;
  if (spare == 0) return;
  const uint64_t to_kept = std::min(spare, from_kept_);
  if (to_kept > 0) budgets_.kept().release(to_kept);
  if (spare > to_kept) budgets_.open().release(spare - to_kept);
  from_kept_ -= to_kept;
  leased_ = used_;
}

}  // namespace minivmm::nbd
