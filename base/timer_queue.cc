// SPDX-License-Identifier: Apache-2.0
#include "base/timer_queue.h"

#include <utility>

namespace minivmm::base {

void TimerQueue::place(size_t slot, Timer* timer) noexcept {
  heap_[slot] = timer;
  timer->slot_ = slot;
}

void TimerQueue::sift_up(size_t slot) noexcept {
  Timer* const timer = heap_[slot];
  while (slot > 0) {
    const size_t parent = (slot - 1) / 2;
    if (heap_[parent]->deadline_ <= timer->deadline_) break;
    place(slot, heap_[parent]);
    slot = parent;
  }
  place(slot, timer);
}

void TimerQueue::sift_down(size_t slot) noexcept {
  Timer* const timer = heap_[slot];
  for (;;) {
    size_t child = 2 * slot + 1;
    if (child >= heap_.size()) break;
    if (child + 1 < heap_.size() && heap_[child + 1]->deadline_ < heap_[child]->deadline_) ++child;
    if (timer->deadline_ <= heap_[child]->deadline_) break;
    place(slot, heap_[child]);
    slot = child;
  }
  place(slot, timer);
}

void TimerQueue::remove(size_t slot) noexcept {
  Timer* const removed = heap_[slot];
  Timer* const last = heap_.back();
  heap_.pop_back();
  removed->slot_ = Timer::kNone;
  if (last == removed) return;
  place(slot, last);
  sift_up(slot);
  sift_down(last->slot_);
}

void TimerQueue::arm(Timer& timer, Clock::time_point deadline) {
  disarm(timer);
  timer.deadline_ = deadline;
  heap_.push_back(&timer);
  timer.slot_ = heap_.size() - 1;
  sift_up(timer.slot_);
}

void TimerQueue::disarm(Timer& timer) noexcept {
  if (timer.armed()) remove(timer.slot_);
}

std::optional<Clock::time_point> TimerQueue::next_deadline() const noexcept {
  if (heap_.empty()) return std::nullopt;
  return heap_.front()->deadline_;
}

size_t TimerQueue::fire_due(Clock::time_point now) noexcept {
  size_t fired = 0;
  while (!heap_.empty() && heap_.front()->deadline_ <= now) {
    Timer* const timer = heap_.front();
    remove(0);
    ++fired;
    timer->callback_(timer->argument_);
  }
  return fired;
}

}  // namespace minivmm::base
