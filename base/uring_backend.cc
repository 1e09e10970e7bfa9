// SPDX-License-Identifier: Apache-2.0
// The io_uring backend: submissions gather in the ring and go to the kernel a few at a time, or in
// the same call that waits for completions.
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <utility>

#include <liburing.h>

#include "base/error.h"
#include "base/io_backend.h"
#include "base/unique_fd.h"

namespace minivmm::base {
namespace {

// user_data of completions that belong to no IoOp.
constexpr uint64_t kIgnored = 0;
constexpr uint64_t kWakeup = 1;

// So many operations do not wait for the end of the turn: a device that gets all 32 at once has
// nothing to do while they are completed and the next are prepared. Measured at depth 32, O_DIRECT
// on a virtio disk: 73,000 reads a second if all wait, 84,000 with 4, 87,000 with 1, which costs
// fast devices more calls than it wins.
constexpr unsigned kSubmitBatch = 4;

// All that prepare() and the wake-up submit.
constexpr uint8_t kOperations[] = {IORING_OP_READV,    IORING_OP_WRITEV,      IORING_OP_READ,
                                   IORING_OP_WRITE,    IORING_OP_FSYNC,       IORING_OP_FALLOCATE,
                                   IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL};

// A submission holds 32 bits of length; what is beyond is a short transfer, which goes on.
unsigned one_length(const IoOp& op) noexcept {
  return static_cast<unsigned>(std::min<size_t>(op.iov->iov_len, size_t{1} << 30));
}

class UringBackend final : public IoBackend {
 public:
  explicit UringBackend(unsigned entries);
  ~UringBackend() override { ::io_uring_queue_exit(&ring_); }

  const char* name() const noexcept override { return "io_uring"; }
  void submit(IoOp& op) noexcept override;
  void cancel(IoOp& op) noexcept override;
  void poll(std::optional<std::chrono::nanoseconds> timeout, CompletionSink& sink) override;
  bool quiet() const noexcept override;
  void wake() noexcept override;

 private:
  void set_up(unsigned entries);
  void probe();
  void restrict_and_enable();
  bool prepare(IoOp& op) noexcept;
  void arm_wakeup() noexcept;
  void queue_overflow(IoOp& op) noexcept;
  void submit_overflow() noexcept;
  bool prepare_cancel(IoOp& op) noexcept;
  void forget_cancel(IoOp& op) noexcept;
  void submit_cancels() noexcept;
  unsigned reap(CompletionSink& sink) noexcept;
  void wait(std::optional<std::chrono::nanoseconds> timeout) noexcept;

  io_uring ring_{};
  UniqueFd wake_fd_;
  uint64_t wake_value_ = 0;  // where the armed read of wake_fd_ goes
  bool wake_armed_ = false;
  bool tells_work_ = false;  // the kernel says when it has deferred work for us
  // Operations that found the submission queue full, oldest first.
  IoOp* overflow_head_ = nullptr;
  IoOp* overflow_tail_ = nullptr;
  // Operations in the kernel whose cancelling found it full too; those have `cancelled` set.
  IoOp* cancels_ = nullptr;
};

UringBackend::UringBackend(unsigned entries) {
  wake_fd_.reset(::eventfd(0, EFD_CLOEXEC));
  if (!wake_fd_) throw errno_error(errno, "eventfd");
  set_up(entries);
  try {
    probe();
    restrict_and_enable();
  } catch (...) {
    ::io_uring_queue_exit(&ring_);
    throw;
  }
}

void UringBackend::set_up(unsigned entries) {
  // Deferred task work runs in our own io_uring_enter, never by interrupting a fiber. Kernels
  // before 6.1 lack it, those before 5.19 the others: fall back by steps.
  const unsigned attempts[] = {
      IORING_SETUP_SUBMIT_ALL | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
          IORING_SETUP_TASKRUN_FLAG,
      IORING_SETUP_SUBMIT_ALL | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG, 0};
  int result = -EINVAL;
  for (const unsigned flags : attempts) {
    io_uring_params params{};
    params.flags = flags | IORING_SETUP_CQSIZE | IORING_SETUP_R_DISABLED;
    params.cq_entries = entries * 4;
    result = ::io_uring_queue_init_params(entries, &ring_, &params);
    if (result != -EINVAL) break;
  }
  if (result < 0) throw errno_error(-result, "io_uring_setup");
  tells_work_ = (ring_.flags & IORING_SETUP_TASKRUN_FLAG) != 0;
  // Saves a reference count on the file table in each enter; refused harmlessly before 5.18.
  (void)::io_uring_register_ring_fd(&ring_);
}

void UringBackend::probe() {
  io_uring_probe* const found = ::io_uring_get_probe_ring(&ring_);
  if (found == nullptr) throw Error(ENOSYS, "io_uring: this kernel cannot be probed");
  bool complete = true;
  for (const int op : kOperations) {
    complete = complete && ::io_uring_opcode_supported(found, op) != 0;
  }
  ::io_uring_free_probe(found);
  // The timeout of io_uring_enter itself (5.11) keeps timers out of the ring.
  if (!complete || (ring_.features & IORING_FEAT_EXT_ARG) == 0) {
    throw Error(ENOSYS, "io_uring: this kernel's is too old (5.11 is needed)");
  }
}

// A filter of system calls (io_threads.h) sees nothing of what a ring does, open files and sockets
// for example: the ring itself is restricted to what is used here.
void UringBackend::restrict_and_enable() {
  io_uring_restriction allowed[std::size(kOperations) + 1] = {};
  for (size_t i = 0; i < std::size(kOperations); ++i) {
    allowed[i].opcode = IORING_RESTRICTION_SQE_OP;
    allowed[i].sqe_op = kOperations[i];
  }
  allowed[std::size(kOperations)].opcode = IORING_RESTRICTION_REGISTER_OP;
  allowed[std::size(kOperations)].register_op = IORING_UNREGISTER_RING_FDS;
  // By number: Debian 12's liburing does not export these two.
  const auto tell = [&](unsigned what, const void* list, size_t count) {
    return ::syscall(SYS_io_uring_register, ring_.ring_fd, what, list, count);
  };
  if (tell(IORING_REGISTER_RESTRICTIONS, allowed, std::size(allowed)) < 0 ||
      tell(IORING_REGISTER_ENABLE_RINGS, nullptr, 0) < 0) {
    throw errno_error(errno, "io_uring: restrictions");
  }
}

bool UringBackend::prepare(IoOp& op) noexcept {
  io_uring_sqe* const sqe = ::io_uring_get_sqe(&ring_);
  if (sqe == nullptr) return false;
  const auto length = static_cast<__u64>(op.length);
  switch (op.opcode) {
    case IoOpcode::kReadv:
      if (op.iov_count == 1) {
        ::io_uring_prep_read(sqe, op.fd, op.iov->iov_base, one_length(op), op.offset);
      } else {
        ::io_uring_prep_readv(sqe, op.fd, op.iov, op.iov_count, op.offset);
      }
      break;
    case IoOpcode::kWritev:
      if (op.iov_count == 1) {
        ::io_uring_prep_write(sqe, op.fd, op.iov->iov_base, one_length(op), op.offset);
      } else {
        ::io_uring_prep_writev(sqe, op.fd, op.iov, op.iov_count, op.offset);
      }
      sqe->rw_flags = static_cast<__kernel_rwf_t>(op.flags);
      break;
    case IoOpcode::kFsync:
      ::io_uring_prep_fsync(sqe, op.fd, op.flags != 0 ? IORING_FSYNC_DATASYNC : 0);
      break;
    case IoOpcode::kFallocate:
      ::io_uring_prep_fallocate(sqe, op.fd, static_cast<int>(op.flags),
                                static_cast<off_t>(op.offset), static_cast<off_t>(length));
      break;
    case IoOpcode::kPoll:
      ::io_uring_prep_poll_add(sqe, op.fd, op.flags);
      break;
  }
  ::io_uring_sqe_set_data(sqe, &op);
  return true;
}

void UringBackend::queue_overflow(IoOp& op) noexcept {
  op.next = nullptr;
  op.parked = true;
  if (overflow_tail_ != nullptr) {
    overflow_tail_->next = &op;
  } else {
    overflow_head_ = &op;
  }
  overflow_tail_ = &op;
}

void UringBackend::submit(IoOp& op) noexcept {
  op.parked = false;
  op.cancelled = false;
  if (overflow_head_ != nullptr || !prepare(op)) {
    // Make room first; what the kernel does not take now waits its turn.
    (void)::io_uring_submit(&ring_);
    if (overflow_head_ != nullptr || !prepare(op)) queue_overflow(op);
  }
  if (::io_uring_sq_ready(&ring_) >= kSubmitBatch) (void)::io_uring_submit(&ring_);
}

void UringBackend::submit_overflow() noexcept {
  while (overflow_head_ != nullptr) {
    IoOp& op = *overflow_head_;
    if (!prepare(op)) {
      (void)::io_uring_submit(&ring_);
      if (!prepare(op)) return;
    }
    overflow_head_ = op.next;
    if (overflow_head_ == nullptr) overflow_tail_ = nullptr;
    op.parked = false;
    if (std::exchange(op.cancelled, false)) cancel(op);
  }
}

void UringBackend::cancel(IoOp& op) noexcept {
  if (op.cancelled) return;
  if (op.parked) {
    op.cancelled = true;  // the kernel does not know it yet: cancelled when it does
    return;
  }
  if (prepare_cancel(op)) return;
  (void)::io_uring_submit(&ring_);
  if (prepare_cancel(op)) return;
  // The ring is full: poll() tries again, unless the operation ends first.
  op.cancelled = true;
  op.prev = nullptr;
  op.next = cancels_;
  if (cancels_ != nullptr) cancels_->prev = &op;
  cancels_ = &op;
}

bool UringBackend::prepare_cancel(IoOp& op) noexcept {
  io_uring_sqe* const sqe = ::io_uring_get_sqe(&ring_);
  if (sqe == nullptr) return false;
  ::io_uring_prep_cancel(sqe, &op, 0);
  ::io_uring_sqe_set_data64(sqe, kIgnored);
  return true;
}

void UringBackend::forget_cancel(IoOp& op) noexcept {
  op.cancelled = false;
  (op.prev != nullptr ? op.prev->next : cancels_) = op.next;
  if (op.next != nullptr) op.next->prev = op.prev;
}

void UringBackend::submit_cancels() noexcept {
  while (cancels_ != nullptr && prepare_cancel(*cancels_)) forget_cancel(*cancels_);
}

void UringBackend::arm_wakeup() noexcept {
  if (wake_armed_) return;
  io_uring_sqe* const sqe = ::io_uring_get_sqe(&ring_);
  if (sqe == nullptr) return;  // full: poll() does not sleep then, and tries again
  ::io_uring_prep_read(sqe, wake_fd_.get(), &wake_value_, sizeof wake_value_, 0);
  ::io_uring_sqe_set_data64(sqe, kWakeup);
  wake_armed_ = true;
}

bool UringBackend::quiet() const noexcept {
  if (!tells_work_ || !wake_armed_ || overflow_head_ != nullptr || cancels_ != nullptr) {
    return false;
  }
  constexpr unsigned kSomething = IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW;
  return ::io_uring_sq_ready(&ring_) == 0 && ::io_uring_cq_ready(&ring_) == 0 &&
         (__atomic_load_n(ring_.sq.kflags, __ATOMIC_ACQUIRE) & kSomething) == 0;
}

void UringBackend::wake() noexcept {
  const uint64_t one = 1;
  // Fails only when the counter is about to overflow: then it is readable already.
  (void)!::write(wake_fd_.get(), &one, sizeof one);
}

unsigned UringBackend::reap(CompletionSink& sink) noexcept {
  unsigned head = 0;
  unsigned count = 0;
  io_uring_cqe* cqe = nullptr;
  io_uring_for_each_cqe(&ring_, head, cqe) {
    ++count;
    if (cqe->user_data == kWakeup) {
      wake_armed_ = false;
    } else if (cqe->user_data != kIgnored) {
      auto* op = reinterpret_cast<IoOp*>(cqe->user_data);
      op->result = cqe->res;
      if (op->cancelled) forget_cancel(*op);
      sink.on_complete(*op);
    }
  }
  ::io_uring_cq_advance(&ring_, count);
  return count;
}

void UringBackend::wait(std::optional<std::chrono::nanoseconds> timeout) noexcept {
  io_uring_cqe* cqe = nullptr;
  if (!timeout) {
    (void)::io_uring_submit_and_wait(&ring_, 1);
    return;
  }
  __kernel_timespec spec{};
  spec.tv_sec = timeout->count() / 1'000'000'000;
  spec.tv_nsec = timeout->count() % 1'000'000'000;
  (void)::io_uring_submit_and_wait_timeout(&ring_, &cqe, 1, &spec, nullptr);
}

void UringBackend::poll(std::optional<std::chrono::nanoseconds> timeout, CompletionSink& sink) {
  submit_overflow();
  submit_cancels();
  arm_wakeup();
  const bool must_not_sleep = overflow_head_ != nullptr || cancels_ != nullptr || !wake_armed_ ||
                              timeout == std::chrono::nanoseconds(0);
  if (must_not_sleep) {
    // Also runs deferred task work, which is what makes completions visible.
    (void)::io_uring_submit_and_get_events(&ring_);
  } else {
    wait(timeout);
  }
  (void)reap(sink);
}

}  // namespace

std::unique_ptr<IoBackend> make_uring_backend(unsigned entries) {
  return std::make_unique<UringBackend>(entries);
}

}  // namespace minivmm::base
