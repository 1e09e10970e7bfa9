// SPDX-License-Identifier: Apache-2.0
#include "base/pool.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include <fmt/core.h>

#include "base/event_loop.h"

namespace minivmm::base {

Pool::Pool(std::string name, unsigned max_threads, std::optional<IoThread> kind)
    : name_(std::move(name)), max_threads_(std::max(1U, max_threads)), kind_(kind) {}

Pool::~Pool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  available_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Pool& Pool::syscalls() {
  static Pool pool("syscalls", 8);
  return pool;
}

Pool& Pool::errands() {
  static Pool pool("errands", 4, std::nullopt);
  return pool;
}

Pool& Pool::work() {
  static Pool pool("work", std::max(1U, std::thread::hardware_concurrency()), IoThread::kWork);
  return pool;
}

// Under the mutex.
void Pool::add_thread() {
  const auto number = static_cast<unsigned>(threads_.size());
  const bool inherits = this_io_thread_is_confined();
  threads_.emplace_back([this, number, inherits] { thread_main(number, inherits); });
}

void Pool::start_threads() {
  const std::lock_guard lock(mutex_);
  while (threads_.size() < max_threads_) add_thread();
}

void Pool::submit(Task& task) {
  task.next = nullptr;
  const std::lock_guard lock(mutex_);
  (tail_ != nullptr ? tail_->next : head_) = &task;
  tail_ = &task;
  ++queued_;
  // A thread that was woken counts as idle until it runs. A task more than there are such threads
  // would stand behind another one, however long that blocks.
  if (queued_ > idle_ && threads_.size() < max_threads_) {
    try {
      add_thread();
    } catch (...) {
      // No more threads to be had: those that exist will do. Without any, nobody would: nothing
      // but this task is queued then.
      if (threads_.empty()) {
        head_ = tail_ = nullptr;
        queued_ = 0;
        throw;
      }
    }
  } else {
    available_.notify_one();
  }
}

void Pool::thread_main(unsigned number, bool inherited_filter) {
  const std::string name = fmt::format("{}-{}", name_, number).substr(0, 15);
  ::pthread_setname_np(::pthread_self(), name.c_str());
  // A loop's filter is that of its pools.
  bool confined = !kind_ || (inherited_filter && kind_ == IoThread::kPool);
  std::unique_lock lock(mutex_);
  for (;;) {
    while (head_ == nullptr) {
      if (stopping_) return;
      ++idle_;
      available_.wait(lock);
      --idle_;
    }
    Task& task = *head_;
    head_ = task.next;
    if (head_ == nullptr) tail_ = nullptr;
    --queued_;
    lock.unlock();
    if (!confined && io_threads_are_confined()) {
      confine_io_thread(*kind_, name);
      confined = true;
    }
    task.run(task);
    lock.lock();
  }
}

bool Pool::on_fiber() noexcept { return Fiber::current() != nullptr; }
Fiber* Pool::current_fiber() noexcept { return Fiber::current(); }
void Pool::wake(Fiber* fiber) noexcept { fiber->loop().wake(*fiber); }

void Pool::wait_for(Task& task, Pool& pool) {
  pool.submit(task);
  Fiber::current()->waiting_for = "a pool thread";
  Fiber::current()->suspend();
}

}  // namespace minivmm::base
