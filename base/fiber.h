// SPDX-License-Identifier: Apache-2.0
// Stackful fibers: a request runs as straight-line code on a small stack of its own and is
// suspended wherever it must wait.
//
// A fiber belongs to the EventLoop it was spawned on and never moves to another thread. It owns its
// stack; the loop's StackPool owns idle stacks. Users deal with EventLoop::spawn and the
// primitives of sync.h; this header is what those are made of. It is the one place that knows the
// context switch and the sanitizers' and the C++ runtime's needs around it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "base/stack_pool.h"

namespace minivmm::base {

class EventLoop;

class Fiber {
 public:
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes a fiber that will run `body` when first resumed. `body` is moved onto the fiber's own
  // stack. `name` must outlive the fiber (a literal): it is what state dumps show.
  template <typename Body>
  static Fiber* create(EventLoop& loop, StackPool& stacks, const char* name, Body&& body);

  // Switches to this fiber until it suspends or ends. Called on the loop's thread, by the loop or
  // by another fiber of it. Returns true if it ended; it must then be destroyed.
  bool resume() noexcept;
  // Gives the stack, and with it this object, back.
  void destroy() noexcept;

  // Suspends the fiber that calls it; returns when somebody resumes it. `this` must be running.
  void suspend() noexcept;

  EventLoop& loop() const noexcept { return *loop_; }
  // Bytes of stack below the caller's frame. `this` must be running.
  size_t stack_left() const noexcept {
    const char* here = static_cast<const char*>(__builtin_frame_address(0));
    return static_cast<size_t>(here - stack_.bottom);
  }
  const char* name() const noexcept { return name_; }
  // What the fiber waits for, for state dumps; a literal or nullptr.
  const char* waiting_for = nullptr;

  // The fiber that runs on this thread, or nullptr.
  static Fiber* current() noexcept;

  // Link in the loop's ready and remote queues, which own it while it is queued.
  Fiber* next_ready = nullptr;
  // Links in the loop's list of live fibers.
  Fiber* live_prev = nullptr;
  Fiber* live_next = nullptr;

 private:
  // The two words of __cxa_eh_globals: a fiber suspended inside a catch block has its own.
  struct ExceptionState {
    void* caught = nullptr;
    unsigned int uncaught = 0;
  };

  Fiber(EventLoop& loop, StackPool& stacks, Stack stack, const char* name) noexcept
      : loop_(&loop), stacks_(&stacks), stack_(stack), name_(name) {}
  ~Fiber() = default;

  // Prepares the context; the stack below `this` (and below the body) is free for it.
  void prepare(void* stack_top) noexcept;
  void leave() noexcept;  // the last switch away
  struct Entry;

  EventLoop* loop_;
  StackPool* stacks_;
  Stack stack_;
  const char* name_;
  void (*run_)(void* body) noexcept = nullptr;  // runs and destroys the body
  void* body_ = nullptr;
  void* context_ = nullptr;          // where to resume; valid while suspended
  void* resumer_context_ = nullptr;  // who resumed; valid while running
  bool ended_ = false;
  ExceptionState exceptions_;
  // Sanitizers: ASan's fake stacks and the resumer's bounds, TSan's fiber handle.
  [[maybe_unused]] void* asan_fake_stack_ = nullptr;
  [[maybe_unused]] const void* asan_resumer_bottom_ = nullptr;
  [[maybe_unused]] size_t asan_resumer_size_ = 0;
  [[maybe_unused]] void* tsan_fiber_ = nullptr;
  [[maybe_unused]] void* tsan_resumer_ = nullptr;
};

template <typename Body>
Fiber* Fiber::create(EventLoop& loop, StackPool& stacks, const char* name, Body&& body) {
  using Stored = std::decay_t<Body>;
  static_assert(sizeof(Stored) <= 2048, "a fiber's closure lives on its stack: capture less");
  const Stack stack = stacks.take();
  auto top = reinterpret_cast<uintptr_t>(stack.top());
  top = (top - sizeof(Fiber)) & ~uintptr_t{63};
  auto* fiber = new (reinterpret_cast<void*>(top)) Fiber(loop, stacks, stack, name);
  top = (top - sizeof(Stored)) & ~uintptr_t{alignof(Stored) > 16 ? alignof(Stored) - 1 : 15};
  fiber->body_ = new (reinterpret_cast<void*>(top)) Stored(std::forward<Body>(body));
  // noexcept: an exception that leaves a fiber has nowhere to go. Bodies catch what they expect.
  fiber->run_ = [](void* p) noexcept {
    auto* stored = static_cast<Stored*>(p);
    (*stored)();
    stored->~Stored();
  };
  fiber->prepare(reinterpret_cast<void*>(top));
  return fiber;
}

}  // namespace minivmm::base
