// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/link.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/fresh_stack.h"
#include "base/io.h"
#include "base/log.h"
#include "base/pool.h"
#include "block/protocols/nbd/read_coverage.h"
#include "block/protocols/nbd/tls_setup.h"

namespace minivmm::block {
namespace {

constexpr const char* kAllocation = "base:allocation";
// How often a connect that is being waited for looks whether it is still wanted.
constexpr auto kLook = std::chrono::milliseconds(200);

// Waits for the descriptor until `deadline`. Negative: nothing came.
int64_t poll_until(int fd, uint32_t events, base::Clock::time_point deadline) {
  base::CancelSource late;
  base::Timer timer([](void* p) noexcept { static_cast<base::CancelSource*>(p)->cancel(); }, &late);
  base::TimerQueue& timers = base::EventLoop::current()->timers();
  timers.arm(timer, deadline);
  const int64_t result = base::io::poll(fd, events, &late);
  timers.disarm(timer);
  return result;
}

struct DisarmAtEnd {
  base::Timer& timer;
  ~DisarmAtEnd() { base::EventLoop::current()->timers().disarm(timer); }
};

uint32_t events_of(unsigned direction) noexcept {
  uint32_t out = 0;
  if ((direction & LIBNBD_AIO_DIRECTION_READ) != 0) out |= POLLIN;
  if ((direction & LIBNBD_AIO_DIRECTION_WRITE) != 0) out |= POLLOUT;
  return out;
}

}  // namespace

// A command whose answer a fiber of the home loop waits for.
struct NbdLink::Waiting {
  NbdLink& link;
  NbdCommand& command;
  ReadCoverage coverage{command.offset, command.length};
  base::Fiber* fiber = nullptr;  // set while it is suspended
  bool done = false;
  int error = 0;

  static int on_done(void* user, int* error) noexcept {
    auto& self = *static_cast<Waiting*>(user);
    self.done = true;
    self.error = *error;
    self.link.completed_.store(self.link.answers() + 1, std::memory_order_relaxed);
    NbdCommand& command = self.command;
    if (*error == 0 && command.kind == NbdCommand::Kind::kRead && !self.coverage.complete()) {
      self.error = EPROTO;
    }
    if (*error == 0 && command.unflushed != nullptr) command.unflushed->add(*command.record);
    if (self.fiber != nullptr) self.link.home_.wake(*self.fiber);
    return 1;  // libnbd forgets the command
  }
  static int on_chunk(void* user, const void*, size_t count, uint64_t offset, unsigned status,
                      int*) noexcept {
    if (status != LIBNBD_READ_ERROR) static_cast<Waiting*>(user)->coverage.add(offset, count);
    return 0;
  }
  static int on_extents(void* user, const char*, uint64_t, uint32_t* entries, size_t count,
                        int*) noexcept {
    auto& command = static_cast<Waiting*>(user)->command;
    if (count >= 2) {
      command.status_length = entries[0];
      command.status_flags = entries[1];
    }
    return 0;
  }
};

// --- connecting ---

NbdLink::NbdLink(base::EventLoop& home, const Libnbd& library, std::chrono::seconds patience)
    : home_(home),
      nbd_(library),
      handle_(library.create()),
      patience_(patience),
      silence_(&look_for_answers, this) {
  if (handle_ == nullptr) throw base::Error(ENOMEM, "libnbd: no memory for a connection");
}

NbdLink::~NbdLink() { nbd_.close(handle_); }

std::shared_ptr<NbdLink> NbdLink::connect(const NbdTarget& target, base::Clock::time_point deadline,
                                          const std::atomic<bool>& stop) {
  const Libnbd& library = *base::Pool::errands().run([] { return &libnbd(); });
  const std::shared_ptr<NbdLink> out(
      new NbdLink(*base::EventLoop::current(), library, target.request_timeout));
  out->configure(target);
  out->handshake(target, deadline, stop);
  out->learn();
  out->home_.spawn("nbd client", [out] { out->drive(); });
  return out;
}

void NbdLink::fail(const NbdTarget& target) const {
  const char* const said = nbd_.get_error();
  const int err = nbd_.get_errno();
  throw base::Error(err != 0 ? err : EIO,
                    fmt::format("{}: {}", target.uri.text(), said != nullptr ? said : "failed"));
}

void NbdLink::configure(const NbdTarget& target) {
  const base::NbdUri& uri = target.uri;
  const bool good = nbd_.set_export_name(handle_, uri.export_name.c_str()) == 0 &&
                    nbd_.add_meta_context(handle_, kAllocation) == 0 &&
                    nbd_.set_pread_initialize(handle_, false) == 0 &&
                    set_up_tls(nbd_, handle_, uri);
  if (!good) fail(target);
}

// Every step is an errand: names are resolved, certificates read and checked there, which
// blocks and wants a thread's stack.
void NbdLink::handshake(const NbdTarget& target, base::Clock::time_point deadline,
                        const std::atomic<bool>& stop) {
  // libnbd keeps the text of an error for the thread that ran into it.
  const auto step = [&](auto&& call) {
    base::Pool::errands().run([&] {
      if (call() != 0) fail(target);
    });
  };
  const base::NbdUri& uri = target.uri;
  // A server that never ends an answer keeps libnbd in one step, which only the socket's end ends.
  base::Timer late([](void* link) noexcept { static_cast<NbdLink*>(link)->cut(); }, this);
  const DisarmAtEnd disarm{late};
  step([&] {
    if (uri.is_unix()) return nbd_.aio_connect_unix(handle_, uri.socket_path.c_str());
    if (uri.is_vsock()) return nbd_.aio_connect_vsock(handle_, *uri.vsock_cid, uri.vsock_port);
    return nbd_.aio_connect_tcp(handle_, uri.host.c_str(), std::to_string(uri.port).c_str());
  });
  while (nbd_.aio_is_connecting(handle_) == 1) {
    const auto now = base::Clock::now();
    if (stop.load(std::memory_order_relaxed)) throw base::Error(ECANCELED, "no longer wanted");
    if (now >= deadline) {
      throw base::Error(ETIMEDOUT, fmt::format("{}: the server does not answer", uri.text()));
    }
    const unsigned direction = nbd_.aio_get_direction(handle_);
    const int64_t ready =
        poll_until(nbd_.aio_get_fd(handle_), events_of(direction), std::min(deadline, now + kLook));
    if (ready <= 0) continue;
    // Of several addresses it is the one that answers.
    if (!socket_ && (ready & (POLLIN | POLLERR | POLLHUP)) == POLLIN) {
      take_socket();
      home_.timers().arm(late, deadline);
    }
    const bool write = (direction & LIBNBD_AIO_DIRECTION_WRITE) != 0 &&
                       ((ready & POLLIN) == 0 || direction == LIBNBD_AIO_DIRECTION_WRITE);
    step([&] { return write ? nbd_.aio_notify_write(handle_) : nbd_.aio_notify_read(handle_); });
  }
  if (over()) {
    throw base::Error(ECONNRESET, fmt::format("{}: the server closed the connection", uri.text()));
  }
  if (!socket_) take_socket();
}

// libnbd closes its descriptor when the connection ends, and the number is somebody else's then.
void NbdLink::take_socket() {
  base::Pool::errands().run([this] {
    socket_.reset(::fcntl(nbd_.aio_get_fd(handle_), F_DUPFD_CLOEXEC, 0));
    if (!socket_) throw base::errno_error(errno, "NBD: another descriptor");
  });
}

void NbdLink::learn() {
  const auto yes = [this](int (*ask)(nbd_handle*)) { return ask(handle_) == 1; };
  const auto block = [this](int kind) {
    const int64_t value = nbd_.get_block_size(handle_, kind);
    return static_cast<uint32_t>(std::clamp<int64_t>(value, 0, UINT32_MAX));
  };
  const int64_t size = nbd_.get_size(handle_);
  if (size < 0) throw base::Error(EFBIG, "NBD: the server's export is larger than any disk may be");
  info_.size = static_cast<uint64_t>(size);
  info_.minimum_block = block(LIBNBD_SIZE_MINIMUM);
  info_.preferred_block = block(LIBNBD_SIZE_PREFERRED);
  info_.maximum_block = block(LIBNBD_SIZE_MAXIMUM);
  info_.read_only = yes(nbd_.is_read_only);
  info_.flush = yes(nbd_.can_flush);
  info_.fua = yes(nbd_.can_fua);
  info_.trim = yes(nbd_.can_trim);
  info_.zero = yes(nbd_.can_zero);
  info_.fast_zero = yes(nbd_.can_fast_zero);
  info_.cache = yes(nbd_.can_cache);
  info_.multi_conn = yes(nbd_.can_multi_conn);
  info_.allocation = nbd_.can_meta_context(handle_, kAllocation) == 1;
  info_.tls = yes(nbd_.get_tls_negotiated);
  const char* const protocol = nbd_.get_protocol(handle_);
  info_.protocol = protocol != nullptr ? protocol : "";
}

bool NbdLink::over() const noexcept {
  return nbd_.aio_is_dead(handle_) == 1 || nbd_.aio_is_closed(handle_) == 1;
}

// --- commands ---

int NbdLink::run(NbdCommand& command) {
  if (home_.on_own_thread()) return run_here(command);
  base::Fiber& caller = *base::Fiber::current();
  int result = kLost;
  home_.post("nbd command", [this, self = shared_from_this(), &command, &result, &caller] {
    result = run_here(command);
    caller.loop().wake(caller);
  });
  caller.waiting_for = "an NBD connection's loop";
  caller.suspend();
  return result;
}

int NbdLink::run_here(NbdCommand& command) {
  if (ended_ || over()) return kLost;
  Waiting waiting{*this, command};
  if (in_flight_.fetch_add(1, std::memory_order_relaxed) == 0) watch_answers();
  int64_t cookie = -1;
  base::run_with_stack([&] { cookie = issue(command, waiting); });
  if (cookie < 0) {
    const int err = nbd_.get_errno();
    in_flight_.fetch_sub(1, std::memory_order_relaxed);
    if (over()) return kLost;
    return err > 0 ? err : EIO;
  }
  // What the socket did not take is sent when it has room.
  if (!waiting.done && !watches_write_ && poll_ != nullptr &&
      (nbd_.aio_get_direction(handle_) & LIBNBD_AIO_DIRECTION_WRITE) != 0) {
    poll_->cancel();
  }
  if (!waiting.done) {
    waiting.fiber = base::Fiber::current();
    waiting.fiber->waiting_for = "an NBD server's answer";
    waiting.fiber->suspend();
  }
  in_flight_.fetch_sub(1, std::memory_order_relaxed);
  // A server that is ending says so with ESHUTDOWN: the same as if it were gone.
  if (waiting.error == ENOTCONN || waiting.error == ESHUTDOWN) return kLost;
  return waiting.error;
}

// One timer for all commands: it costs none of them anything, and finds silence between one and two
// times the patience after it began.
void NbdLink::watch_answers() noexcept {
  if (patience_.count() == 0 || silence_.armed()) return;
  completed_before_ = answers();
  home_.timers().arm(silence_, base::Clock::now() + patience_);
}

void NbdLink::look_for_answers(void* link) noexcept {
  auto& self = *static_cast<NbdLink*>(link);
  if (self.in_flight_.load(std::memory_order_relaxed) == 0) return;
  if (self.answers() != self.completed_before_) return self.watch_answers();
  base::log_warning("an NBD server has not answered for {} seconds: the connection is cut",
                    self.patience_.count());
  self.cut();
}

int64_t NbdLink::issue(NbdCommand& c, Waiting& waiting) noexcept {
  const nbd_completion_callback done{&Waiting::on_done, &waiting, nullptr};
  switch (c.kind) {
    case NbdCommand::Kind::kRead:
      return nbd_.aio_pread_structured(handle_, c.data, c.length, c.offset,
                                       {&Waiting::on_chunk, &waiting, nullptr}, done, 0);
    case NbdCommand::Kind::kWrite:
      return nbd_.aio_pwrite(handle_, c.data, c.length, c.offset, done, c.flags);
    case NbdCommand::Kind::kZero:
      return nbd_.aio_zero(handle_, c.length, c.offset, done, c.flags);
    case NbdCommand::Kind::kTrim:
      return nbd_.aio_trim(handle_, c.length, c.offset, done, c.flags);
    case NbdCommand::Kind::kFlush:
      return nbd_.aio_flush(handle_, done, 0);
    case NbdCommand::Kind::kCache:
      return nbd_.aio_cache(handle_, c.length, c.offset, done, 0);
    case NbdCommand::Kind::kStatus:
      break;
  }
  const nbd_extent_callback extents{&Waiting::on_extents, &waiting, nullptr};
  return nbd_.aio_block_status(handle_, c.length, c.offset, extents, done, LIBNBD_CMD_FLAG_REQ_ONE);
}

// --- driving ---

// libnbd must not be told of data that are not there: it would wait for them before it sends
// another command.
bool NbdLink::more_has_come() const noexcept {
  char byte;
  return ::recv(socket_.get(), &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 1;
}

void NbdLink::drive() {
  while (!over()) {
    const unsigned direction = nbd_.aio_get_direction(handle_);
    base::CancelSource wake;
    poll_ = &wake;
    watches_write_ = (direction & LIBNBD_AIO_DIRECTION_WRITE) != 0;
    const int64_t ready = base::io::poll(socket_.get(), events_of(direction), &wake);
    poll_ = nullptr;
    if (ready > 0) advance(ready);
  }
  // libnbd has told every command by now.
  ended_ = true;
  cut();
  home_.timers().disarm(silence_);
  if (when_ended_) std::exchange(when_ended_, nullptr)(shared_from_this());
  if (leaving_ != nullptr) home_.wake(*leaving_);
}

void NbdLink::advance(int64_t ready) noexcept {
  const unsigned direction = nbd_.aio_get_direction(handle_);
  const bool reads = (direction & LIBNBD_AIO_DIRECTION_READ) != 0;
  if (reads && (ready & ~int64_t{POLLOUT}) != 0) {
    // Each call takes one answer; several have come where many commands are in flight.
    uint64_t before = 0;
    do {
      before = answers();
      (void)nbd_.aio_notify_read(handle_);
    } while (answers() != before && more_has_come() && !over() &&
             (nbd_.aio_get_direction(handle_) & LIBNBD_AIO_DIRECTION_READ) != 0);
    return;
  }
  (void)nbd_.aio_notify_write(handle_);
}

// --- the end ---

void NbdLink::cut() noexcept { ::shutdown(socket_.get(), SHUT_RDWR); }

bool NbdLink::close(base::Clock::time_point deadline) {
  base::Fiber& caller = *base::Fiber::current();
  if (home_.on_own_thread()) return leave(deadline);
  bool in_time = true;
  home_.post("nbd close", [this, self = shared_from_this(), deadline, &in_time, &caller] {
    in_time = leave(deadline);
    caller.loop().wake(caller);
  });
  caller.waiting_for = "an NBD connection's end";
  caller.suspend();
  return in_time;
}

bool NbdLink::leave(base::Clock::time_point deadline) {
  if (ended_) return true;
  if (nbd_.aio_disconnect(handle_, 0) != 0) cut();
  if (poll_ != nullptr) poll_->cancel();
  base::Timer timer([](void* link) noexcept { static_cast<NbdLink*>(link)->cut(); }, this);
  home_.timers().arm(timer, deadline);
  leaving_ = base::Fiber::current();
  leaving_->waiting_for = "an NBD server to close the connection";
  leaving_->suspend();
  leaving_ = nullptr;
  const bool in_time = timer.armed();
  home_.timers().disarm(timer);
  return in_time;
}

}  // namespace minivmm::block
