// SPDX-License-Identifier: Apache-2.0
// The backend for where io_uring is refused: sockets, pipes and eventfds wait in epoll; files,
// which are always "ready", go to a bounded pool of threads.
#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/error.h"
#include "base/io_backend.h"
#include "base/pool.h"
#include "base/unique_fd.h"

namespace minivmm::base {
namespace {

int64_t to_result(int64_t value) noexcept { return value < 0 ? -errno : value; }

// Operations on files, on a thread of the pool.
int64_t run_blocking(const IoOp& op) noexcept {
  const auto offset = static_cast<off_t>(op.offset);
  const auto count = static_cast<int>(op.iov_count);
  switch (op.opcode) {
    case IoOpcode::kReadv:
      return to_result(::preadv(op.fd, op.iov, count, offset));
    case IoOpcode::kWritev:
      return to_result(::pwritev2(op.fd, op.iov, count, offset, static_cast<int>(op.flags)));
    case IoOpcode::kFsync:
      return to_result(op.flags != 0 ? ::fdatasync(op.fd) : ::fsync(op.fd));
    case IoOpcode::kFallocate:
      return to_result(
          ::fallocate(op.fd, static_cast<int>(op.flags), offset, static_cast<off_t>(op.length)));
    default:
      return -EINVAL;
  }
}

// A readable eventfd or pipe; -EAGAIN: wait for readiness again.
int64_t run_ready(const IoOp& op) noexcept {
  const auto count = static_cast<int>(op.iov_count);
  return to_result(op.opcode == IoOpcode::kWritev ? ::writev(op.fd, op.iov, count)
                                                  : ::readv(op.fd, op.iov, count));
}

bool is_file_op(const IoOp& op) noexcept {
  switch (op.opcode) {
    case IoOpcode::kReadv:
    case IoOpcode::kWritev:
      return op.offset != kNoOffset;
    case IoOpcode::kFsync:
    case IoOpcode::kFallocate:
      return true;
    default:
      return false;
  }
}

uint32_t wanted_events(const IoOp& op) noexcept {
  switch (op.opcode) {
    case IoOpcode::kPoll:
      return op.flags;
    case IoOpcode::kWritev:
      return EPOLLOUT;
    default:
      return EPOLLIN;
  }
}

class EpollBackend final : public IoBackend {
 public:
  explicit EpollBackend(unsigned threads);
  ~EpollBackend() override;

  const char* name() const noexcept override { return "epoll"; }
  void submit(IoOp& op) noexcept override;
  void cancel(IoOp& op) noexcept override;
  void poll(std::optional<std::chrono::nanoseconds> timeout, CompletionSink& sink) override;
  void wake() noexcept override;

 private:
  // A file operation on its way through the pool.
  struct FileTask : Pool::Task {
    EpollBackend* backend;
    IoOp* op;
  };
  // All operations that wait for one descriptor.
  struct Waiters {
    IoOp* head = nullptr;
    uint32_t armed = 0;
  };

  void complete(IoOp& op, int64_t result) noexcept;
  void submit_file(IoOp& op) noexcept;
  void park(IoOp& op) noexcept;
  void unpark(Waiters& waiters, IoOp& op) noexcept;
  void update_interest(int fd, Waiters& waiters) noexcept;
  void on_ready(int fd, uint32_t events) noexcept;
  bool take_finished() noexcept;
  void wait(std::optional<std::chrono::nanoseconds> timeout) noexcept;

  UniqueFd epoll_;
  UniqueFd wake_fd_;
  std::unordered_map<int, Waiters> waiting_;
  std::vector<IoOp*> done_;               // completed, to be given to the sink
  std::atomic<IoOp*> finished_{nullptr};  // pushed by pool threads
  std::vector<std::unique_ptr<FileTask>> spare_tasks_;
  Pool files_;  // last: joined first
};

EpollBackend::EpollBackend(unsigned threads) : files_("file-io", threads) {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  wake_fd_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !wake_fd_) throw errno_error(errno, "epoll");
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.fd = wake_fd_.get();
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, wake_fd_.get(), &event) != 0) {
    throw errno_error(errno, "epoll_ctl");
  }
}

EpollBackend::~EpollBackend() = default;

void EpollBackend::wake() noexcept {
  const uint64_t one = 1;
  (void)!::write(wake_fd_.get(), &one, sizeof one);
}

void EpollBackend::complete(IoOp& op, int64_t result) noexcept {
  op.result = result;
  done_.push_back(&op);
}

void EpollBackend::submit(IoOp& op) noexcept {
  op.cancelled = false;
  op.parked = false;
  if (is_file_op(op)) {
    submit_file(op);
    return;
  }
  park(op);
}

void EpollBackend::submit_file(IoOp& op) noexcept {
  std::unique_ptr<FileTask> task;
  if (spare_tasks_.empty()) {
    task = std::make_unique<FileTask>();
  } else {
    task = std::move(spare_tasks_.back());
    spare_tasks_.pop_back();
  }
  task->backend = this;
  task->op = &op;
  task->run = [](Pool::Task& t) noexcept {
    auto& self = static_cast<FileTask&>(t);
    IoOp& done = *self.op;
    EpollBackend& backend = *self.backend;
    done.result = run_blocking(done);
    // The task's memory goes back with the operation: the loop's thread frees it.
    done.prev = reinterpret_cast<IoOp*>(&self);
    done.next = backend.finished_.load(std::memory_order_relaxed);
    while (!backend.finished_.compare_exchange_weak(done.next, &done, std::memory_order_seq_cst,
                                                    std::memory_order_relaxed)) {
    }
    backend.wake();
  };
  files_.submit(*task.release());
}

bool EpollBackend::take_finished() noexcept {
  IoOp* op = finished_.exchange(nullptr, std::memory_order_acq_rel);
  const bool any = op != nullptr;
  while (op != nullptr) {
    IoOp* const next = op->next;
    spare_tasks_.emplace_back(reinterpret_cast<FileTask*>(op->prev));
    done_.push_back(op);
    op = next;
  }
  return any;
}

void EpollBackend::park(IoOp& op) noexcept {
  Waiters& waiters = waiting_[op.fd];
  // At the end: first come, first served.
  IoOp** link = &waiters.head;
  IoOp* prev = nullptr;
  while (*link != nullptr) prev = *link, link = &(*link)->next;
  *link = &op;
  op.prev = prev;
  op.next = nullptr;
  op.parked = true;
  update_interest(op.fd, waiters);
}

void EpollBackend::unpark(Waiters& waiters, IoOp& op) noexcept {
  if (op.prev != nullptr) {
    op.prev->next = op.next;
  } else {
    waiters.head = op.next;
  }
  if (op.next != nullptr) op.next->prev = op.prev;
  op.parked = false;
}

void EpollBackend::update_interest(int fd, Waiters& waiters) noexcept {
  uint32_t events = 0;
  for (const IoOp* op = waiters.head; op != nullptr; op = op->next) events |= wanted_events(*op);
  if (events == waiters.armed) return;
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  int result = 0;
  if (events == 0) {
    (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);  // may be closed already
    waiting_.erase(fd);
    return;
  }
  if (waiters.armed != 0) result = ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
  if (waiters.armed == 0 || (result != 0 && errno == ENOENT)) {
    result = ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
  }
  if (result == 0) {
    waiters.armed = events;
    return;
  }
  // A descriptor that epoll refuses (a regular file, a closed one): every waiter learns why.
  const int err = errno;
  while (IoOp* op = waiters.head) {
    unpark(waiters, *op);
    complete(*op, op->opcode == IoOpcode::kPoll && err == EPERM ? static_cast<int64_t>(op->flags)
                                                                : -err);
  }
  waiting_.erase(fd);
}

void EpollBackend::on_ready(int fd, uint32_t events) noexcept {
  const auto found = waiting_.find(fd);
  if (found == waiting_.end()) return;
  Waiters& waiters = found->second;
  constexpr uint32_t kAlways = EPOLLERR | EPOLLHUP;
  for (IoOp* op = waiters.head; op != nullptr;) {
    IoOp* const next = op->next;
    const uint32_t hit = events & (wanted_events(*op) | kAlways);
    if (hit != 0) {
      const int64_t result =
          op->opcode == IoOpcode::kPoll ? static_cast<int64_t>(hit) : run_ready(*op);
      if (result != -EAGAIN && result != -EWOULDBLOCK) {
        unpark(waiters, *op);
        complete(*op, result);
      }
    }
    op = next;
  }
  update_interest(fd, waiters);
}

void EpollBackend::cancel(IoOp& op) noexcept {
  if (!op.parked) return;  // in the pool, or done: it ends by itself
  const auto found = waiting_.find(op.fd);
  if (found == waiting_.end()) return;
  unpark(found->second, op);
  complete(op, -ECANCELED);
  update_interest(op.fd, found->second);
}

void EpollBackend::wait(std::optional<std::chrono::nanoseconds> timeout) noexcept {
  epoll_event events[64];
  int milliseconds = -1;
  if (!done_.empty() || finished_.load(std::memory_order_seq_cst) != nullptr) {
    milliseconds = 0;
  } else if (timeout) {
    // Rounded up: waking early would only spin.
    milliseconds =
        static_cast<int>(std::min<int64_t>((timeout->count() + 999'999) / 1'000'000, 3'600'000));
  }
  const int count = ::epoll_wait(epoll_.get(), events, 64, milliseconds);
  for (int i = 0; i < count; ++i) {
    if (events[i].data.fd == wake_fd_.get()) {
      uint64_t value = 0;
      (void)!::read(wake_fd_.get(), &value, sizeof value);
    } else {
      on_ready(events[i].data.fd, events[i].events);
    }
  }
}

void EpollBackend::poll(std::optional<std::chrono::nanoseconds> timeout, CompletionSink& sink) {
  wait(timeout);
  (void)take_finished();
  for (IoOp* op : done_) sink.on_complete(*op);
  done_.clear();
}

}  // namespace

std::unique_ptr<IoBackend> make_epoll_backend(unsigned threads) {
  return std::make_unique<EpollBackend>(threads);
}

}  // namespace minivmm::base
