// SPDX-License-Identifier: Apache-2.0
// What an EventLoop needs from the kernel: start operations, wait for completions, be woken from
// other threads. Two implementations, chosen when the loop starts: io_uring, and epoll with a
// bounded thread pool where io_uring is refused (seccomp, sysctl, old kernels).
//
// All methods but wake() belong to the loop's thread.
#pragma once

#include <string>

#include <chrono>
#include <memory>
#include <optional>

#include "base/io_op.h"

namespace minivmm::base {

// Given each operation that has completed (its result is set).
class CompletionSink {
 public:
  virtual void on_complete(IoOp& op) noexcept = 0;

 protected:
  ~CompletionSink() = default;
};

class IoBackend {
 public:
  virtual ~IoBackend() = default;

  virtual const char* name() const noexcept = 0;

  // Takes the operation in. It may be handed to the kernel only at the next poll().
  virtual void submit(IoOp& op) noexcept = 0;
  // Asks for an early end; the operation still completes through the sink, often with -ECANCELED.
  virtual void cancel(IoOp& op) noexcept = 0;

  // Hands over what was submitted and collects completions. `timeout`: nullopt waits until
  // something happens, zero does not wait.
  virtual void poll(std::optional<std::chrono::nanoseconds> timeout, CompletionSink& sink) = 0;

  // True if poll() would find nothing now, nor has anything to hand over. It costs no system call;
  // where that cannot be told without one it is false.
  virtual bool quiet() const noexcept { return false; }

  // Any thread: makes a waiting or the next poll() return soon.
  virtual void wake() noexcept = 0;
};

// Throws base::Error with the reason when io_uring cannot be used here.
std::unique_ptr<IoBackend> make_uring_backend(unsigned entries);
std::unique_ptr<IoBackend> make_epoll_backend(unsigned threads);

}  // namespace minivmm::base
