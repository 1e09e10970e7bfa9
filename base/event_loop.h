// SPDX-License-Identifier: Apache-2.0
// One thread, one ring, many fibers.
//
// The loop runs what is ready, hands all new I/O to the kernel in one call, and wakes the fibers
// whose I/O has completed. Fibers stay on the loop that they started on. Work comes from other
// threads through post() and wake().
//
// Life: construct anywhere; run() on the thread that is to be the loop's; stop() from any thread.
// run() returns once stop() was called and every fiber has ended; it never abandons a fiber.
#pragma once

#include <string>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>
#include <vector>

#include "base/fiber.h"
#include "base/idle_spin.h"
#include "base/io_backend.h"
#include "base/poll_set.h"
#include "base/stack_pool.h"
#include "base/timer_queue.h"

namespace minivmm::base {

enum class BackendChoice { kAuto, kUring, kEpoll };

struct EventLoopOptions {
  std::string name = "loop";                     // thread name, at most 15 characters
  BackendChoice backend = BackendChoice::kAuto;  // kAuto: io_uring, or epoll where it is refused
  unsigned ring_entries = 512;
  // How long the loop may look for work before it sleeps; see idle_spin.h. Zero: never.
  std::chrono::nanoseconds spin_limit = std::chrono::microseconds(50);
};

class EventLoop final : private CompletionSink {
 public:
  explicit EventLoop(EventLoopOptions options = {});
  EventLoop(const EventLoop&) = delete;
  EventLoop& operator=(const EventLoop&) = delete;
  ~EventLoop();

  // --- Any thread ---

  // Runs until stop() and the end of the last fiber. Throws base::Error if kUring was asked for
  // and is refused. Call once.
  void run();
  void stop() noexcept;

  // Runs `body` as a new fiber of this loop. Throws std::bad_alloc. False: run() has returned, or
  // is about to, and the body will never run.
  template <typename Body>
  bool post(const char* name, Body&& body);

  // Runs `body` as a fiber of this loop and blocks the calling thread (not a fiber, not the loop's
  // own thread) until it has ended; rethrows what it threw. Throws base::Error if the loop has
  // ended.
  template <typename Body>
  auto call(const char* name, Body&& body) -> std::invoke_result_t<Body>;

  // Makes a suspended fiber of this loop ready. Exactly one wake a suspension.
  void wake(Fiber& fiber) noexcept;

  // A small number that is unique among the loops alive, below kMaxLoops; for per-loop counters.
  unsigned index() const noexcept { return index_; }
  static constexpr unsigned kMaxLoops = 64;
  const std::string& name() const noexcept { return options_.name; }
  const char* backend_name() const noexcept {
    return backend_name_.load(std::memory_order_acquire);
  }
  bool on_own_thread() const noexcept { return current() == this; }

  // The loop that runs on this thread, or nullptr.
  static EventLoop* current() noexcept;

  // --- The loop's own thread ---

  // Starts a fiber at the next turn of the loop.
  template <typename Body>
  void spawn(const char* name, Body&& body);
  // Starts a fiber and runs it until it first suspends or ends; then the caller goes on.
  template <typename Body>
  void spawn_now(const char* name, Body&& body);

  // --- The loop's own thread, on a fiber ---

  // Suspends the fiber until the operation has completed; returns op.result.
  int64_t run_io(IoOp& op) noexcept;
  // Asks for the early end of an operation that a fiber of this loop waits for in run_io.
  void cancel_io(IoOp& op) noexcept;
  // Lets everything else that is ready run first.
  void yield() noexcept;

  TimerQueue& timers() noexcept { return timers_; }
  // When it last had nothing to do.
  Clock::time_point last_idle() const noexcept { return last_idle_; }
  size_t live_fibers() const noexcept { return live_count_; }
  // "name: waiting for x" of each live fiber, at most `limit` of them.
  std::vector<std::string> describe_fibers(size_t limit) const;

 private:
  struct PostedBody {
    virtual ~PostedBody() = default;
    virtual void start(EventLoop& loop) = 0;
    PostedBody* next = nullptr;
  };
  template <typename Body>
  struct PostedBodyOf;

  void on_complete(IoOp& op) noexcept override;
  void start_backend();
  void run_ready() noexcept;
  void look() noexcept;
  bool spin();
  void sleep();
  void push_ready(Fiber& fiber) noexcept;
  void take_remote();
  bool remote_pending() const noexcept;
  void wake_thread() noexcept;
  bool post_body(std::unique_ptr<PostedBody> body) noexcept;
  static PostedBody* closed() noexcept;
  bool close() noexcept;
  std::optional<std::chrono::nanoseconds> poll_timeout() const noexcept;
  template <typename Body>
  Fiber* make_fiber(const char* name, Body&& body);
  void link_live(Fiber& fiber) noexcept;
  void resume(Fiber& fiber) noexcept;

  const EventLoopOptions options_;
  const unsigned index_;
  std::atomic<const char*> backend_name_{"none"};
  std::atomic<bool> stopping_{false};

  // Posted to by other threads; each is a stack that is taken whole. At the end, that of bodies is
  // closed().
  std::atomic<Fiber*> remote_fibers_{nullptr};
  std::atomic<PostedBody*> remote_bodies_{nullptr};
  // True while the thread is about to sleep or sleeping in poll(): then a poster must wake it.
  std::atomic<bool> sleeping_{false};
  std::atomic<IoBackend*> wake_target_{nullptr};

  // The loop's thread only.
  std::unique_ptr<IoBackend> backend_;
  StackPool stacks_;
  PollSet polls_;  // not given to the backend yet
  TimerQueue timers_;
  IdleSpin idle_spin_;
  Clock::time_point last_idle_{};
  Fiber* ready_head_ = nullptr;
  Fiber* ready_tail_ = nullptr;
  Fiber* live_head_ = nullptr;
  size_t live_count_ = 0;
};

}  // namespace minivmm::base

#include "base/event_loop_inl.h"
