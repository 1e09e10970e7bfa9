// SPDX-License-Identifier: Apache-2.0
#include "base/io.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>

#include <limits.h>

#include "base/event_loop.h"

namespace minivmm::base::io {
namespace {

EventLoop& loop() noexcept { return *EventLoop::current(); }

int64_t run_cancellable(IoOp& op, CancelSource* cancel) noexcept {
  if (cancel == nullptr) return loop().run_io(op);
  if (cancel->cancelled()) return -ECANCELED;
  op.next = nullptr;
  const CancelSource::Registration registration(
      cancel, [](void* argument) noexcept { loop().cancel_io(*static_cast<IoOp*>(argument)); },
      &op);
  const int64_t result = loop().run_io(op);
  // A kernel that had it half-way says EINTR.
  return cancel->cancelled() && result == -EINTR ? -ECANCELED : result;
}

int64_t run_uninterrupted(IoOp& op) noexcept {
  for (;;) {
    const int64_t result = loop().run_io(op);
    if (result != -EINTR) return result;
  }
}

// Moves all of `span`, in as many operations as that takes; stops early at a zero result.
int64_t transfer_all(IoOp& op, IoSpan span) noexcept {
  const uint64_t offset = op.offset;
  uint64_t done = 0;
  IoList rest;
  IoSpan left = span;
  while (left.bytes() > 0) {
    op.iov = left.data();
    op.iov_count = static_cast<uint32_t>(std::min<size_t>(left.count(), IOV_MAX));
    op.offset = offset + done;
    const int64_t n = loop().run_io(op);
    if (n == -EINTR) continue;
    if (n == -EAGAIN) {
      // The kernel is short of memory, which does not end by asking again at once.
      (void)sleep_for(std::chrono::milliseconds(1));
      continue;
    }
    if (n < 0) return n;
    if (n == 0) break;
    done += static_cast<uint64_t>(n);
    if (done == span.bytes()) break;
    left = slice(span, done, span.bytes() - done, rest);
  }
  return static_cast<int64_t>(done);
}

}  // namespace

int64_t read_at(int fd, IoSpan to, uint64_t offset) noexcept {
  IoOp op{.opcode = IoOpcode::kReadv, .fd = fd, .offset = offset};
  return transfer_all(op, to);
}

int64_t write_at(int fd, IoSpan from, uint64_t offset) noexcept {
  IoOp op{.opcode = IoOpcode::kWritev, .fd = fd, .offset = offset};
  return transfer_all(op, from);
}

int64_t fsync(int fd, bool data_only) noexcept {
  IoOp op{.opcode = IoOpcode::kFsync, .fd = fd, .flags = data_only ? 1U : 0U};
  return run_uninterrupted(op);
}

int64_t fallocate(int fd, int mode, uint64_t offset, uint64_t length) noexcept {
  IoOp op{.opcode = IoOpcode::kFallocate,
          .fd = fd,
          .flags = static_cast<uint32_t>(mode),
          .offset = offset,
          .length = length};
  return run_uninterrupted(op);
}

int64_t poll(int fd, uint32_t events, CancelSource* cancel) noexcept {
  IoOp op{.opcode = IoOpcode::kPoll, .fd = fd, .flags = events};
  return run_cancellable(op, cancel);
}

int64_t read_eventfd(int fd, CancelSource* cancel) noexcept {
  uint64_t value = 0;
  const iovec iov{&value, sizeof value};
  IoOp op{.opcode = IoOpcode::kReadv, .fd = fd, .iov_count = 1, .iov = &iov, .offset = kNoOffset};
  for (;;) {
    const int64_t result = run_cancellable(op, cancel);
    if (result == -EINTR) continue;
    if (result == -EAGAIN) {
      const int64_t ready = poll(fd, POLLIN, cancel);
      if (ready < 0 && ready != -EINTR) return ready;
      continue;
    }
    return result < 0 ? result : static_cast<int64_t>(value);
  }
}

bool sleep_until(Clock::time_point deadline, CancelSource* cancel) {
  if (cancel != nullptr && cancel->cancelled()) return false;
  struct Sleep {
    Fiber* fiber;
    bool woken = false;
    static void wake(void* argument) noexcept {
      auto& self = *static_cast<Sleep*>(argument);
      if (self.woken) return;  // the timer and a cancel in one turn
      self.woken = true;
      self.fiber->loop().wake(*self.fiber);
    }
  };
  Sleep sleep{Fiber::current()};
  Timer timer(&Sleep::wake, &sleep);
  loop().timers().arm(timer, deadline);
  const CancelSource::Registration registration(cancel, &Sleep::wake, &sleep);
  sleep.fiber->waiting_for = "time";
  sleep.fiber->suspend();
  loop().timers().disarm(timer);
  return cancel == nullptr || !cancel->cancelled();
}

bool sleep_for(std::chrono::nanoseconds time, CancelSource* cancel) {
  return sleep_until(Clock::now() + time, cancel);
}

}  // namespace minivmm::base::io
