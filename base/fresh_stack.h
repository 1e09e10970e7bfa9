// SPDX-License-Identifier: Apache-2.0
// Goes on with a deep call chain on a new stack when the present fiber's is nearly used up.
//
// Requests recurse through the layers of the graph; a long backing chain is bounded by
// configuration, not by stack size. The hop costs one pooled stack and happens only when needed.
#pragma once

#include <exception>
#include <utility>

#include "base/event_loop.h"

namespace minivmm::base {

// ASan multiplies frames, and stacks with them (stack_pool.h).
inline constexpr size_t kStackReserve = kFiberStackSize > 64 * 1024 ? 96 * 1024 : 20 * 1024;

inline bool stack_is_low() noexcept {
  const Fiber* fiber = Fiber::current();
  return fiber != nullptr && fiber->stack_left() < kStackReserve;
}

namespace internal {
// Suspends the caller until the fiber that ends with wake_from_fresh_stack has done so.
struct FreshStack {
  Fiber* caller = nullptr;
  bool done = false;
  bool waiting = false;
  std::exception_ptr error;
  void wait() noexcept;
  void finish() noexcept;
};
}  // namespace internal

// Runs `body` on a stack of its own, as part of the calling fiber: returns when it has ended and
// rethrows what it threw. `body` returns nothing.
template <typename Body>
void run_on_fresh_stack(Body&& body) {
  internal::FreshStack hop;
  hop.caller = Fiber::current();
  EventLoop::current()->spawn_now(hop.caller->name(), [&hop, &body] {
    try {
      body();
    } catch (...) {
      hop.error = std::current_exception();
    }
    hop.finish();
  });
  hop.wait();
  if (hop.error) std::rethrow_exception(hop.error);
}

// Runs `body` here, or on a fresh stack where this one is nearly used up.
template <typename Body>
void run_with_stack(Body&& body) {
  if (stack_is_low()) [[unlikely]] {
    run_on_fresh_stack(std::forward<Body>(body));
  } else {
    body();
  }
}

}  // namespace minivmm::base
