// SPDX-License-Identifier: Apache-2.0
#include "base/fiber.h"

#include <boost/context/detail/fcontext.hpp>
#include <cxxabi.h>

#if defined(__SANITIZE_ADDRESS__)
#define MINIVMM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MINIVMM_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define MINIVMM_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MINIVMM_TSAN 1
#endif
#endif

#ifdef MINIVMM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef MINIVMM_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace minivmm::base {
namespace {

namespace ctx = boost::context::detail;

thread_local Fiber* t_current = nullptr;

// A switch never moves a fiber to another thread, but a compiler may not cache the address of a
// thread_local across one either; these calls are not inlined for that reason.
[[gnu::noinline]] Fiber* get_current() noexcept { return t_current; }
[[gnu::noinline]] void set_current(Fiber* fiber) noexcept { t_current = fiber; }

}  // namespace

struct Fiber::Entry {
  static void main(ctx::transfer_t from) {
    auto* fiber = static_cast<Fiber*>(from.data);
    fiber->resumer_context_ = from.fctx;
#ifdef MINIVMM_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &fiber->asan_resumer_bottom_,
                                    &fiber->asan_resumer_size_);
#endif
    fiber->run_(fiber->body_);
    fiber->leave();
    __builtin_unreachable();
  }
};

void Fiber::prepare(void* stack_top) noexcept {
  const auto room = static_cast<size_t>(static_cast<char*>(stack_top) - stack_.bottom);
  context_ = ctx::make_fcontext(stack_top, room, &Entry::main);
#ifdef MINIVMM_TSAN
  tsan_fiber_ = __tsan_create_fiber(0);
  __tsan_set_fiber_name(tsan_fiber_, name_);
#endif
}

Fiber* Fiber::current() noexcept { return get_current(); }

bool Fiber::resume() noexcept {
  Fiber* const previous = get_current();
  set_current(this);
  // The exception state belongs to whoever runs.
  auto* globals = reinterpret_cast<ExceptionState*>(abi::__cxa_get_globals());
  const ExceptionState ours = *globals;
  *globals = exceptions_;
#ifdef MINIVMM_ASAN
  void* our_fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&our_fake_stack, stack_.bottom, stack_.size);
#endif
#ifdef MINIVMM_TSAN
  tsan_resumer_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, 0);
#endif
  const ctx::transfer_t back = ctx::jump_fcontext(context_, this);
#ifdef MINIVMM_ASAN
  __sanitizer_finish_switch_fiber(our_fake_stack, nullptr, nullptr);
#endif
  context_ = back.fctx;
  exceptions_ = *globals;
  *globals = ours;
  set_current(previous);
  return ended_;
}

void Fiber::suspend() noexcept {
#ifdef MINIVMM_ASAN
  __sanitizer_start_switch_fiber(&asan_fake_stack_, asan_resumer_bottom_, asan_resumer_size_);
#endif
#ifdef MINIVMM_TSAN
  __tsan_switch_to_fiber(tsan_resumer_, 0);
#endif
  const ctx::transfer_t from = ctx::jump_fcontext(resumer_context_, nullptr);
#ifdef MINIVMM_ASAN
  __sanitizer_finish_switch_fiber(asan_fake_stack_, &asan_resumer_bottom_, &asan_resumer_size_);
#endif
  resumer_context_ = from.fctx;
}

void Fiber::leave() noexcept {
  ended_ = true;
#ifdef MINIVMM_ASAN
  // nullptr: this fake stack is never needed again.
  __sanitizer_start_switch_fiber(nullptr, asan_resumer_bottom_, asan_resumer_size_);
#endif
#ifdef MINIVMM_TSAN
  __tsan_switch_to_fiber(tsan_resumer_, 0);
#endif
  ctx::jump_fcontext(resumer_context_, nullptr);
}

void Fiber::destroy() noexcept {
#ifdef MINIVMM_TSAN
  __tsan_destroy_fiber(tsan_fiber_);
#endif
  const Stack stack = stack_;
  StackPool& stacks = *stacks_;
  this->~Fiber();
#ifdef MINIVMM_ASAN
  // Frames that were left by the last switch stay poisoned; the next fiber starts clean.
  __asan_unpoison_memory_region(stack.bottom, stack.size);
#endif
  stacks.give_back(stack);
}

}  // namespace minivmm::base
