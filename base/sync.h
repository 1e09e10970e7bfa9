// SPDX-License-Identifier: Apache-2.0
// Locks for fibers. Waiting suspends the fiber, not the thread. All may be shared by fibers of
// different loops. None may be destroyed while anyone waits.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <mutex>

#include "base/wait_queue.h"

namespace minivmm::base {

// A mutex that may be held across I/O. First come, first served. Meets BasicLockable, so
// std::lock_guard and std::unique_lock work.
class FiberMutex {
 public:
  void lock();
  bool try_lock();
  void unlock() noexcept;

 private:
  std::mutex mutex_;
  WaitQueue waiters_;
  bool held_ = false;
  uint32_t handed_over_ = 0;
};

// Readers share, a writer is alone. A waiting writer holds back new readers. Meets SharedLockable.
class FiberSharedMutex {
 public:
  void lock();
  void unlock() noexcept;
  void lock_shared();
  void unlock_shared() noexcept;

 private:
  std::mutex mutex_;
  WaitQueue readers_;
  WaitQueue writers_;
  uint32_t active_readers_ = 0;
  uint32_t waiting_writers_ = 0;
  bool writing_ = false;
};

// Counts units of something bounded: requests, bytes. First come, first served: a large request
// is not starved by small ones.
class Semaphore {
 public:
  explicit Semaphore(uint64_t units) noexcept : free_(units) {}
  // `units` must not exceed what the semaphore was made with.
  void acquire(uint64_t units = 1);
  bool try_acquire(uint64_t units = 1);
  void release(uint64_t units = 1) noexcept;
  uint64_t available() const;

 private:
  mutable std::mutex mutex_;
  WaitQueue waiters_;
  std::deque<uint64_t> wanted_;  // by each waiter, in the order of waiters_
  uint64_t free_;
};

// Counts users of something that will be closed: enter() fails once close() was called, and close()
// waits for those inside.
class Gate {
 public:
  bool enter();
  void leave() noexcept;
  // Closes and waits until empty. May be called more than once.
  void close();
  bool close_until(Clock::time_point deadline);  // false: somebody is still inside
  bool closed() const;
  uint64_t inside() const;

 private:
  mutable std::mutex mutex_;
  WaitQueue waiters_;
  uint64_t inside_ = 0;
  bool closed_ = false;
};

// A flag to wait for.
class Event {
 public:
  void set();
  void reset();
  bool is_set() const;
  void wait();
  bool wait_until(Clock::time_point deadline);

 private:
  mutable std::mutex mutex_;
  WaitQueue waiters_;
  bool set_ = false;
};

// Counts fibers that were started and waits for their end.
class WaitGroup {
 public:
  void add(uint64_t n = 1);
  void done() noexcept;
  void wait();

 private:
  std::mutex mutex_;
  WaitQueue waiters_;
  uint64_t running_ = 0;
};

}  // namespace minivmm::base
