// SPDX-License-Identifier: Apache-2.0
// Bounded threads for what would block a loop or burn its time. Only closures go to a pool, never
// fibers. Three exist, so that one kind of work cannot starve the other: leaf system calls (seeks,
// fallocate on old file systems), errands (what has to open or change something while the other
// threads are confined, see io_threads.h), and work (compression, libraries with deep stacks).
//
// Threads start on first use and are named; a pool is destroyed after its users.
#pragma once

#include <string>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <type_traits>
#include <vector>

#include "base/io_threads.h"

namespace minivmm::base {

class Fiber;

class Pool {
 public:
  // `kind`: the filter that its threads get, or none.
  Pool(std::string name, unsigned max_threads, std::optional<IoThread> kind = IoThread::kPool);
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  ~Pool();

  // Fiber: runs `work` on a thread of the pool and suspends until it is done. Rethrows what it
  // threw. Outside a fiber it simply calls `work`.
  template <typename Work>
  auto run(Work&& work) -> std::invoke_result_t<Work>;

  // Any thread: runs `task.run(task)` on a thread of the pool. The task lives until then. Throws
  // std::system_error where the pool's first thread cannot be made; the task is not kept then.
  struct Task {
    void (*run)(Task& task) noexcept = nullptr;
    Task* next = nullptr;
  };
  void submit(Task& task);

  // Any thread: makes all threads now. Throws std::system_error.
  void start_threads();

  // The process's pools.
  static Pool& syscalls();  // leaf system calls
  static Pool& errands();   // never confined
  static Pool& work();      // as many threads as cores

 private:
  void add_thread();
  void thread_main(unsigned number, bool inherited_filter);
  static bool on_fiber() noexcept;
  static void wait_for(Task& task, Pool& pool);
  static void wake(Fiber* fiber) noexcept;
  static Fiber* current_fiber() noexcept;

  const std::string name_;
  const unsigned max_threads_;
  const std::optional<IoThread> kind_;
  std::mutex mutex_;
  std::condition_variable available_;
  Task* head_ = nullptr;
  Task* tail_ = nullptr;
  size_t queued_ = 0;
  size_t idle_ = 0;  // threads that wait, also those that are being woken
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

template <typename Work>
auto Pool::run(Work&& work) -> std::invoke_result_t<Work> {
  using Result = std::invoke_result_t<Work>;
  if (!on_fiber()) return work();
  struct Job : Task {
    std::remove_reference_t<Work>* work;
    Fiber* fiber;
    std::exception_ptr error;
    std::conditional_t<std::is_void_v<Result>, char, std::optional<Result>> result{};
  };
  Job job;
  job.work = &work;
  job.fiber = current_fiber();
  job.run = [](Task& task) noexcept {
    auto& self = static_cast<Job&>(task);
    try {
      if constexpr (std::is_void_v<Result>) {
        (*self.work)();
      } else {
        self.result.emplace((*self.work)());
      }
    } catch (...) {
      self.error = std::current_exception();
    }
    wake(self.fiber);
  };
  wait_for(job, *this);
  if (job.error) std::rethrow_exception(job.error);
  if constexpr (!std::is_void_v<Result>) return std::move(*job.result);
}

}  // namespace minivmm::base
