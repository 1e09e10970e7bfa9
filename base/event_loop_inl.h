// SPDX-License-Identifier: Apache-2.0
// Templates of event_loop.h.
#pragma once

#include <cerrno>
#include <exception>
#include <future>
#include <utility>

#include "base/error.h"
#include "base/event_loop.h"

namespace minivmm::base {

template <typename Body>
struct EventLoop::PostedBodyOf final : EventLoop::PostedBody {
  PostedBodyOf(const char* n, Body&& b) : name(n), body(std::move(b)) {}
  void start(EventLoop& loop) override { loop.spawn(name, std::move(body)); }
  const char* name;
  Body body;
};

template <typename Body>
bool EventLoop::post(const char* name, Body&& body) {
  using Stored = std::decay_t<Body>;
  Stored copy(std::forward<Body>(body));
  return post_body(std::make_unique<PostedBodyOf<Stored>>(name, std::move(copy)));
}

template <typename Body>
auto EventLoop::call(const char* name, Body&& body) -> std::invoke_result_t<Body> {
  using Result = std::invoke_result_t<Body>;
  std::promise<Result> promise;
  auto future = promise.get_future();
  const bool runs = post(name, [&promise, &body] {
    try {
      if constexpr (std::is_void_v<Result>) {
        body();
        promise.set_value();
      } else {
        promise.set_value(body());
      }
    } catch (...) {
      promise.set_exception(std::current_exception());
    }
  });
  if (!runs) throw Error(ESHUTDOWN, "the event loop has ended");
  return future.get();
}

template <typename Body>
Fiber* EventLoop::make_fiber(const char* name, Body&& body) {
  Fiber* fiber = Fiber::create(*this, stacks_, name, std::forward<Body>(body));
  link_live(*fiber);
  return fiber;
}

template <typename Body>
void EventLoop::spawn(const char* name, Body&& body) {
  push_ready(*make_fiber(name, std::forward<Body>(body)));
}

template <typename Body>
void EventLoop::spawn_now(const char* name, Body&& body) {
  resume(*make_fiber(name, std::forward<Body>(body)));
}

}  // namespace minivmm::base
