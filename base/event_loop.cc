// SPDX-License-Identifier: Apache-2.0
#include "base/event_loop.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <thread>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::base {
namespace {

thread_local EventLoop* t_loop = nullptr;

// Hands out loop indices.
class IndexTable {
 public:
  unsigned take() {
    const std::lock_guard lock(mutex_);
    for (unsigned i = 0; i < taken_.size(); ++i) {
      if (!taken_[i]) {
        taken_[i] = true;
        return i;
      }
    }
    throw Error(EAGAIN, fmt::format("more than {} event loops", EventLoop::kMaxLoops));
  }
  void give_back(unsigned i) {
    const std::lock_guard lock(mutex_);
    taken_[i] = false;
  }

 private:
  std::mutex mutex_;
  std::array<bool, EventLoop::kMaxLoops> taken_{};
};

IndexTable& indices() {
  static IndexTable table;
  return table;
}

// Other threads inside wake(), post() and stop(), by loop. A loop may take what they queued, end
// and be destroyed before they have touched it for the last time; its destructor waits for them.
struct alignas(64) Visitors {
  std::atomic<unsigned> count{0};
};
std::array<Visitors, EventLoop::kMaxLoops> g_visitors;

class Visit {
 public:
  explicit Visit(unsigned loop) noexcept : count_(g_visitors[loop].count) {
    count_.fetch_add(1, std::memory_order_relaxed);
  }
  ~Visit() { count_.fetch_sub(1, std::memory_order_release); }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

 private:
  std::atomic<unsigned>& count_;
};

// Enough ready fibers a turn to amortise the system call, few enough that completions and posts
// are not kept waiting.
constexpr unsigned kBatch = 256;
constexpr size_t kIdleStacks = 64;
// A look costs as much as giving way to nobody.
constexpr unsigned kLooksPerYield = 4;

}  // namespace

EventLoop::EventLoop(EventLoopOptions options)
    : options_(std::move(options)), index_(indices().take()), idle_spin_(options_.spin_limit) {}

EventLoop::~EventLoop() {
  while (g_visitors[index_].count.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  // There are some only where run() was never called.
  PostedBody* body = remote_bodies_.exchange(closed());
  while (body != closed() && body != nullptr) {
    PostedBody* next = body->next;
    delete body;
    body = next;
  }
  indices().give_back(index_);
}

EventLoop* EventLoop::current() noexcept { return t_loop; }

void EventLoop::start_backend() {
  if (options_.backend != BackendChoice::kEpoll) {
    try {
      backend_ = make_uring_backend(options_.ring_entries);
    } catch (const Error& e) {
      if (options_.backend == BackendChoice::kUring) throw;
      log_debug("{}: io_uring is refused ({}); using epoll", options_.name, e.what());
    }
  }
  if (!backend_) backend_ = make_epoll_backend(8);
  backend_name_.store(backend_->name(), std::memory_order_release);
  wake_target_.store(backend_.get(), std::memory_order_release);
}

void EventLoop::run() {
  ::pthread_setname_np(::pthread_self(), options_.name.substr(0, 15).c_str());
  start_backend();
  t_loop = this;
  for (;;) {
    take_remote();
    run_ready();
    if (ready_head_ == nullptr && live_count_ == 0 && stopping_.load(std::memory_order_acquire) &&
        close()) {
      break;
    }
    if (poll_timeout() == std::chrono::nanoseconds(0)) {
      look();
    } else if (!spin()) {
      sleep();
    }
    if (timers_.next_deadline()) timers_.fire_due(Clock::now());
  }
  t_loop = nullptr;
  wake_target_.store(nullptr, std::memory_order_release);
}

// Collects what has come about, without waiting.
void EventLoop::look() noexcept {
  polls_.look(*this, *backend_);
  if (!backend_->quiet()) backend_->poll(std::chrono::nanoseconds(0), *this);
}

// Looks for work for a moment; true if there is some.
bool EventLoop::spin() {
  auto now = Clock::now();
  last_idle_ = now;
  if (!idle_spin_.begin(now)) return false;
  auto until = now + idle_spin_.limit();
  if (const auto deadline = timers_.next_deadline()) until = std::min(until, *deadline);
  bool found = false;
  unsigned looks = 0;
  while (!found && now < until) {
    look();
    found = ready_head_ != nullptr || remote_pending();
    // Whoever else wants this CPU goes first: it may be the client that we wait for.
    if (!found && ++looks % kLooksPerYield == 0) ::sched_yield();
    const auto before = std::exchange(now, Clock::now());
    idle_spin_.gave_way(before, now);
  }
  idle_spin_.spun(found);
  return found;
}

void EventLoop::sleep() {
  if (stacks_.idle() > kIdleStacks) stacks_.trim(kIdleStacks);
  polls_.hand_over(*backend_);
  // From here on a poster must wake us; one that came before this is seen by poll_timeout.
  sleeping_.store(true, std::memory_order_seq_cst);
  const auto timeout = poll_timeout();
  const auto begin = Clock::now();
  backend_->poll(timeout, *this);
  sleeping_.store(false, std::memory_order_relaxed);
  idle_spin_.slept(Clock::now() - begin);
}

std::optional<std::chrono::nanoseconds> EventLoop::poll_timeout() const noexcept {
  if (ready_head_ != nullptr || remote_pending() ||
      (live_count_ == 0 && stopping_.load(std::memory_order_seq_cst))) {
    return std::chrono::nanoseconds(0);
  }
  const auto deadline = timers_.next_deadline();
  if (!deadline) return std::nullopt;
  const auto left = *deadline - Clock::now();
  return left.count() > 0 ? std::chrono::nanoseconds(left) : std::chrono::nanoseconds(0);
}

bool EventLoop::remote_pending() const noexcept {
  return remote_fibers_.load(std::memory_order_seq_cst) != nullptr ||
         remote_bodies_.load(std::memory_order_seq_cst) != nullptr;
}

void EventLoop::stop() noexcept {
  const Visit visit(index_);
  stopping_.store(true, std::memory_order_seq_cst);
  wake_thread();
}

void EventLoop::wake_thread() noexcept {
  if (!sleeping_.load(std::memory_order_seq_cst)) return;
  if (IoBackend* target = wake_target_.load(std::memory_order_acquire)) target->wake();
}

EventLoop::PostedBody* EventLoop::closed() noexcept {
  struct Nothing final : PostedBody {
    void start(EventLoop& /*loop*/) override {}
  };
  static Nothing nothing;
  return &nothing;
}

// No body is taken any more. False: there are some.
bool EventLoop::close() noexcept {
  if (remote_fibers_.load(std::memory_order_seq_cst) != nullptr) return false;
  PostedBody* none = nullptr;
  return remote_bodies_.compare_exchange_strong(none, closed(), std::memory_order_seq_cst);
}

bool EventLoop::post_body(std::unique_ptr<PostedBody> body) noexcept {
  const Visit visit(index_);
  body->next = remote_bodies_.load(std::memory_order_relaxed);
  do {
    if (body->next == closed()) return false;
  } while (!remote_bodies_.compare_exchange_weak(body->next, body.get(), std::memory_order_seq_cst,
                                                 std::memory_order_relaxed));
  (void)body.release();
  if (!on_own_thread()) wake_thread();
  return true;
}

void EventLoop::wake(Fiber& fiber) noexcept {
  if (on_own_thread()) {
    push_ready(fiber);
    return;
  }
  const Visit visit(index_);
  fiber.next_ready = remote_fibers_.load(std::memory_order_relaxed);
  while (!remote_fibers_.compare_exchange_weak(fiber.next_ready, &fiber, std::memory_order_seq_cst,
                                               std::memory_order_relaxed)) {
  }
  wake_thread();
}

void EventLoop::take_remote() {
  // Each stack has the newest on top: turn it over to keep the order of arrival.
  Fiber* fiber = remote_fibers_.exchange(nullptr, std::memory_order_acq_rel);
  Fiber* fibers = nullptr;
  while (fiber != nullptr) {
    Fiber* next = fiber->next_ready;
    fiber->next_ready = fibers;
    fibers = fiber;
    fiber = next;
  }
  while (fibers != nullptr) {
    Fiber* next = fibers->next_ready;
    push_ready(*fibers);
    fibers = next;
  }
  PostedBody* body = remote_bodies_.exchange(nullptr, std::memory_order_acq_rel);
  PostedBody* bodies = nullptr;
  while (body != nullptr) {
    PostedBody* next = body->next;
    body->next = bodies;
    bodies = body;
    body = next;
  }
  while (bodies != nullptr) {
    const std::unique_ptr<PostedBody> owned(bodies);
    bodies = bodies->next;
    try {
      owned->start(*this);
    } catch (const std::exception& e) {
      // No memory for a stack: the work is lost, and somebody may wait for it. Say so and end:
      // going on would be a hang.
      log_error("{}: cannot start a posted task: {}", options_.name, e.what());
      std::terminate();
    }
  }
}

void EventLoop::push_ready(Fiber& fiber) noexcept {
  fiber.next_ready = nullptr;
  if (ready_tail_ != nullptr) {
    ready_tail_->next_ready = &fiber;
  } else {
    ready_head_ = &fiber;
  }
  ready_tail_ = &fiber;
}

void EventLoop::run_ready() noexcept {
  for (unsigned n = 0; n < kBatch && ready_head_ != nullptr; ++n) {
    Fiber* const fiber = ready_head_;
    ready_head_ = fiber->next_ready;
    if (ready_head_ == nullptr) ready_tail_ = nullptr;
    resume(*fiber);
  }
}

void EventLoop::resume(Fiber& fiber) noexcept {
  fiber.waiting_for = nullptr;
  if (!fiber.resume()) return;
  if (fiber.live_prev != nullptr) {
    fiber.live_prev->live_next = fiber.live_next;
  } else {
    live_head_ = fiber.live_next;
  }
  if (fiber.live_next != nullptr) fiber.live_next->live_prev = fiber.live_prev;
  --live_count_;
  fiber.destroy();
}

void EventLoop::link_live(Fiber& fiber) noexcept {
  fiber.live_prev = nullptr;
  fiber.live_next = live_head_;
  if (live_head_ != nullptr) live_head_->live_prev = &fiber;
  live_head_ = &fiber;
  ++live_count_;
}

void EventLoop::yield() noexcept {
  Fiber* const self = Fiber::current();
  push_ready(*self);
  self->suspend();
}

int64_t EventLoop::run_io(IoOp& op) noexcept {
  Fiber* const self = Fiber::current();
  op.fiber = self;
  if (op.opcode != IoOpcode::kPoll || !polls_.add(op)) backend_->submit(op);
  self->waiting_for = "I/O";
  self->suspend();
  return op.result;
}

void EventLoop::cancel_io(IoOp& op) noexcept {
  if (op.fiber == nullptr) return;  // it has completed; only its fiber does not know yet
  if (!polls_.remove(op)) {
    backend_->cancel(op);
    return;
  }
  op.result = -ECANCELED;
  on_complete(op);
}

void EventLoop::on_complete(IoOp& op) noexcept { push_ready(*std::exchange(op.fiber, nullptr)); }

std::vector<std::string> EventLoop::describe_fibers(size_t limit) const {
  std::vector<std::string> out;
  for (const Fiber* f = live_head_; f != nullptr && out.size() < limit; f = f->live_next) {
    out.push_back(fmt::format("{}: {}", f->name(),
                              f->waiting_for != nullptr
                                  ? fmt::format("waiting for {}", f->waiting_for)
                                  : std::string("running")));
  }
  return out;
}

}  // namespace minivmm::base
