// SPDX-License-Identifier: Apache-2.0
#include "base/epoch.h"

#include <array>
#include <cassert>
#include <thread>
#include <utility>

#include "base/event_loop.h"

namespace minivmm::base {

// One cache line a loop; [phase].
struct alignas(64) Epoch::Counters {
  std::atomic<uint32_t> inside[2]{0, 0};
};

namespace {

// By loop: set while a leave() that has counted itself out may still look at its epoch. Whoever saw
// the count reach zero may destroy the epoch; the destructor waits for these few instructions.
struct alignas(64) Leaving {
  std::atomic<bool> now{false};
};
std::array<Leaving, EventLoop::kMaxLoops> g_leaving;

}  // namespace

Epoch::Epoch() : counters_(std::make_unique<Counters[]>(EventLoop::kMaxLoops)) {}

Epoch::~Epoch() {
  for (const Leaving& leaving : g_leaving) {
    while (leaving.now.load(std::memory_order_acquire)) std::this_thread::yield();
  }
}

Epoch::Pin& Epoch::Pin::operator=(Pin&& o) noexcept {
  if (this != &o) {
    release();
    epoch_ = std::exchange(o.epoch_, nullptr);
    slot_ = o.slot_;
  }
  return *this;
}

uint32_t Epoch::enter() noexcept {
  const unsigned index = EventLoop::current()->index();
  for (;;) {
    const uint32_t phase = phase_.load(std::memory_order_seq_cst) & 1;
    counters_[index].inside[phase].fetch_add(1, std::memory_order_seq_cst);
    // Re-checked: a synchronize that flipped between the two would not have counted us.
    if ((phase_.load(std::memory_order_seq_cst) & 1) == phase) return index * 2 + phase;
    leave(index * 2 + phase);
  }
}

void Epoch::leave(uint32_t slot) noexcept {
  assert(EventLoop::current() != nullptr && EventLoop::current()->index() == slot / 2);
  std::atomic<bool>& leaving = g_leaving[slot / 2].now;
  leaving.store(true, std::memory_order_relaxed);  // published by the fetch_sub
  counters_[slot / 2].inside[slot % 2].fetch_sub(1, std::memory_order_seq_cst);
  if (waiting_.load(std::memory_order_seq_cst)) {
    const std::lock_guard lock(mutex_);
    drained_.notify_all();
  }
  leaving.store(false, std::memory_order_release);
}

uint64_t Epoch::count(unsigned phase) const noexcept {
  uint64_t sum = 0;
  for (unsigned i = 0; i < EventLoop::kMaxLoops; ++i) {
    sum += counters_[i].inside[phase].load(std::memory_order_seq_cst);
  }
  return sum;
}

uint64_t Epoch::in_flight() const noexcept { return count(0) + count(1); }

bool Epoch::wait(std::unique_lock<std::mutex>& lock, WaitQueue& queue, Clock::time_point deadline) {
  if (deadline != Clock::time_point::max()) {
    return queue.wait_until(lock, deadline, "requests in flight");
  }
  queue.wait(lock, "requests in flight");
  return true;
}

bool Epoch::wait_for_phase(std::unique_lock<std::mutex>& lock, unsigned phase,
                           Clock::time_point deadline) {
  waiting_.store(true, std::memory_order_seq_cst);
  bool drained = true;
  while (count(phase) != 0) {
    if (!wait(lock, drained_, deadline)) {
      drained = count(phase) == 0;
      break;
    }
  }
  waiting_.store(false, std::memory_order_seq_cst);
  return drained;
}

bool Epoch::wait_for_older(std::unique_lock<std::mutex>& lock, Clock::time_point deadline) {
  const uint32_t phase = phase_.load(std::memory_order_relaxed) & 1;
  // Pins that an earlier, timed-out call gave up on are in the other phase: they are older still.
  if (old_phase_busy_ && !wait_for_phase(lock, phase ^ 1, deadline)) return false;
  old_phase_busy_ = false;
  phase_.store(phase ^ 1, std::memory_order_seq_cst);
  const bool drained = wait_for_phase(lock, phase, deadline);
  old_phase_busy_ = !drained;
  return drained;
}

void Epoch::synchronize() { (void)synchronize_until(Clock::time_point::max()); }

bool Epoch::synchronize_until(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  // A call that waits for what never ends has the turn: then so do we wait, but not for ever.
  while (synchronizing_) {
    if (!wait(lock, turns_, deadline) && synchronizing_) return false;
  }
  synchronizing_ = true;
  const bool drained = wait_for_older(lock, deadline);
  synchronizing_ = false;
  turns_.notify_one();
  return drained;
}

}  // namespace minivmm::base
