// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/stream.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>

#include "base/event_loop.h"
#include "base/io.h"
#include "base/pool.h"
#include "nbd-server/address.h"
#include "nbd-server/tls.h"

namespace minivmm::nbd {
namespace {

// Large enough that a batch of replies leaves in one call. The kernel allows less where
// net.core.wmem_max says so.
constexpr int kUnixSendBuffer = 2 << 20;

void tune(int fd) noexcept {
  int domain = 0;
  socklen_t length = sizeof domain;
  if (::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) != 0) return;
  if (domain == AF_UNIX) {
    ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kUnixSendBuffer, sizeof kUnixSendBuffer);
  } else if (domain == AF_INET || domain == AF_INET6) {
    const int one = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    // A client whose host died is noticed in the end.
    ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
  }
}

// Whether the client's host has not confirmed all that was sent to it. Only TCP keeps it here.
bool unconfirmed(int fd) noexcept {
  tcp_info info{};
  socklen_t length = sizeof info;
  if (::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return false;
  constexpr size_t kNeeded = offsetof(tcp_info, tcpi_notsent_bytes) + sizeof(uint32_t);
  return length >= kNeeded && (info.tcpi_unacked > 0 || info.tcpi_notsent_bytes > 0);
}

}  // namespace

Stream::Stream(base::UniqueFd socket) noexcept : socket_(std::move(socket)) { tune(socket_.get()); }

bool Stream::start_tls(std::shared_ptr<const TlsCredentials> credentials,
                       base::CancelSource& cancel, base::Clock::time_point deadline) {
  // Signatures are checked and keys made: work for a thread, on a thread's stack.
  base::Pool& pool =
      credentials->handshake_reads_files() ? base::Pool::errands() : base::Pool::work();
  auto session =
      pool.run([&] { return std::make_unique<TlsSession>(std::move(credentials), socket_.get()); });
  for (;;) {
    switch (pool.run([&] { return session->handshake(); })) {
      case TlsSession::Step::kDone:
        tls_ = std::move(session);
        return true;
      case TlsSession::Step::kWantsRead:
        if (wait_readable(&cancel, deadline) != Wait::kReady) return false;
        break;
      case TlsSession::Step::kWantsWrite:
        if (wait_writable(&cancel, deadline) != Wait::kReady) return false;
        break;
    }
  }
}

void Stream::bye() noexcept {
  if (tls_) tls_->bye();
}

int64_t Stream::try_receive(std::span<iovec> to) noexcept {
  if (tls_) [[unlikely]]
    return tls_->try_receive(to);
  msghdr message{};
  message.msg_iov = to.data();
  message.msg_iovlen = to.size();
  for (;;) {
    const ssize_t n = to.size() == 1
                          ? ::recv(socket_.get(), to[0].iov_base, to[0].iov_len, MSG_DONTWAIT)
                          : ::recvmsg(socket_.get(), &message, MSG_DONTWAIT);
    if (n >= 0) return n;
    if (errno != EINTR) return errno == EWOULDBLOCK ? -EAGAIN : -errno;
  }
}

int64_t Stream::try_send(std::span<iovec> from) noexcept {
  if (tls_) [[unlikely]]
    return tls_->try_send(from);
  msghdr message{};
  message.msg_iov = from.data();
  message.msg_iovlen = from.size();
  for (;;) {
    const ssize_t n = ::sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) return n;
    if (errno != EINTR) return errno == EWOULDBLOCK ? -EAGAIN : -errno;
  }
}

Stream::Wait Stream::wait_readable(base::CancelSource* cancel,
                                   std::optional<base::Clock::time_point> deadline) {
  return wait(POLLIN, cancel, deadline);
}

Stream::Wait Stream::wait_writable(base::CancelSource* cancel,
                                   std::optional<base::Clock::time_point> deadline) {
  return wait(POLLOUT, cancel, deadline);
}

Stream::Wait Stream::wait(uint32_t events, base::CancelSource* cancel,
                          std::optional<base::Clock::time_point> deadline) {
  if (!deadline) {
    const int64_t result = base::io::poll(socket_.get(), events, cancel);
    return result == -ECANCELED ? Wait::kCancelled : Wait::kReady;
  }
  // Either the caller's source or the time ends the wait; both by way of one inner source.
  base::CancelSource either;
  const auto fire = [](void* argument) noexcept {
    static_cast<base::CancelSource*>(argument)->cancel();
  };
  if (cancel != nullptr && cancel->cancelled()) return Wait::kCancelled;
  int64_t result = 0;
  {
    const base::CancelSource::Registration registration(cancel, fire, &either);
    base::Timer timer(fire, &either);
    base::TimerQueue& timers = base::EventLoop::current()->timers();
    timers.arm(timer, *deadline);
    result = base::io::poll(socket_.get(), events, &either);
    timers.disarm(timer);
  }
  if (result != -ECANCELED) return Wait::kReady;
  return cancel != nullptr && cancel->cancelled() ? Wait::kCancelled : Wait::kTimeout;
}

bool Stream::receive_all(std::span<std::byte> to, base::CancelSource& cancel,
                         base::Clock::time_point deadline) {
  while (!to.empty()) {
    iovec iov{to.data(), to.size()};
    const int64_t n = try_receive({&iov, 1});
    if (n > 0) {
      to = to.subspan(static_cast<size_t>(n));
    } else if (n != -EAGAIN || wait_readable(&cancel, deadline) != Wait::kReady) {
      return false;
    }
  }
  return true;
}

bool Stream::send_all(std::span<const std::byte> from, base::CancelSource& cancel,
                      base::Clock::time_point deadline) {
  while (!from.empty()) {
    // SAFETY: sending only reads.
    iovec iov{const_cast<std::byte*>(from.data()), from.size()};
    const int64_t n = try_send({&iov, 1});
    if (n >= 0) {
      from = from.subspan(static_cast<size_t>(n));
    } else if (n != -EAGAIN || wait_writable(&cancel, deadline) != Wait::kReady) {
      return false;
    }
  }
  return true;
}

void Stream::linger(base::Clock::time_point deadline) {
  constexpr auto kTick = std::chrono::milliseconds(10);
  ::shutdown(socket_.get(), SHUT_WR);
  for (auto now = base::Clock::now(); now < deadline && unconfirmed(socket_.get());
       now = base::Clock::now()) {
    std::byte sink[1024];
    const ssize_t n = ::recv(socket_.get(), sink, sizeof sink, MSG_DONTWAIT);
    if (n > 0) {
      base::EventLoop::current()->yield();
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
      return;
    } else {
      (void)wait_readable(nullptr, std::min(deadline, now + kTick));
    }
  }
}

void Stream::shutdown() noexcept { ::shutdown(socket_.get(), SHUT_RDWR); }

std::string Stream::peer_key() const { return nbd::peer_key(socket_.get()); }

std::string Stream::peer() const { return peer_text(socket_.get()); }

}  // namespace minivmm::nbd
