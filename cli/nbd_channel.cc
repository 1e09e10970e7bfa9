// SPDX-License-Identifier: Apache-2.0
#include "cli/nbd_channel.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include <fmt/core.h>
#include <pwd.h>

#include "base/error.h"

namespace minivmm::cli {

using base::Error;

namespace {

// As libnbd does for a key whose user is not said.
std::string login_name() {
  const passwd* const entry = ::getpwuid(::geteuid());
  return entry != nullptr ? entry->pw_name : "";
}

}  // namespace

std::shared_ptr<const nbd::TlsCredentials> nbd_credentials(const base::NbdUri& uri) {
  nbd::TlsClientOptions options;
  options.verify_peer = uri.verify_peer;
  if (!uri.psk_file.empty()) {
    options.kind = nbd::TlsOptions::Kind::kPsk;
    options.key_file = uri.psk_file;
    options.user = uri.user.empty() ? login_name() : uri.user;
  } else {
    options.directory = uri.certificates;
    // A unix socket's server has no name: it needs a certificate of the authority, for whomever.
    options.host = uri.tls_hostname;
    if (options.host.empty() && !uri.is_unix() && !uri.is_vsock()) {
      options.host = uri.host.empty() ? "localhost" : uri.host;
    }
  }
  return std::make_shared<const nbd::TlsCredentials>(options);
}

NbdChannel::NbdChannel(int socket, std::string peer, std::chrono::seconds limit)
    : socket_(socket), peer_(std::move(peer)), limit_(limit) {}

void NbdChannel::fail(int err, const std::string& why) const {
  throw Error(err, fmt::format("{}: {}", peer_, why));
}

void NbdChannel::wait(short events, const char* what) const {
  const auto until = std::chrono::steady_clock::now() + limit_;
  pollfd waited{socket_, events, 0};
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        until - std::chrono::steady_clock::now());
    if (left.count() <= 0) fail(ETIMEDOUT, what);
    const int found = ::poll(&waited, 1, static_cast<int>(left.count()));
    if (found > 0) return;
    if (found < 0 && errno != EINTR) fail(errno, base::errno_text(errno));
  }
}

int64_t NbdChannel::receive_some(std::span<std::byte> to) {
  if (tls_) {
    const iovec part{to.data(), to.size()};
    return tls_->try_receive({&part, 1});
  }
  const ssize_t n = ::recv(socket_, to.data(), to.size(), MSG_DONTWAIT);
  return n < 0 ? -errno : n;
}

int64_t NbdChannel::send_some(std::span<const std::byte> from) {
  if (tls_) {
    // SAFETY: sending only reads.
    const iovec part{const_cast<std::byte*>(from.data()), from.size()};
    return tls_->try_send({&part, 1});
  }
  const ssize_t n = ::send(socket_, from.data(), from.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  return n < 0 ? -errno : n;
}

void NbdChannel::receive(std::span<std::byte> to) {
  while (!to.empty()) {
    const int64_t n = receive_some(to);
    if (n > 0) {
      to = to.subspan(static_cast<size_t>(n));
    } else if (n == -EAGAIN) {
      wait(POLLIN, "no answer in time");
    } else if (n != -EINTR) {
      // With TLS 1.3 this is where a client learns that its certificate or key was refused.
      const std::string trouble = tls_ ? tls_->trouble() : "";
      if (!trouble.empty()) fail(EACCES, trouble);
      fail(n == 0 ? ECONNRESET : static_cast<int>(-n),
           n == 0 ? "the server ended the handshake" : base::errno_text(static_cast<int>(-n)));
    }
  }
}

void NbdChannel::send(std::span<const std::byte> from) {
  while (!from.empty()) {
    const int64_t n = send_some(from);
    if (n >= 0) {
      from = from.subspan(static_cast<size_t>(n));
    } else if (n == -EAGAIN) {
      wait(POLLOUT, "the server does not take the handshake in time");
    } else if (n != -EINTR) {
      fail(static_cast<int>(-n), "the server does not take the handshake");
    }
  }
}

void NbdChannel::start_tls(std::shared_ptr<const nbd::TlsCredentials> credentials) {
  auto session = std::make_unique<nbd::TlsSession>(std::move(credentials), socket_);
  try {
    for (;;) {
      const nbd::TlsSession::Step step = session->handshake();
      if (step == nbd::TlsSession::Step::kDone) break;
      wait(step == nbd::TlsSession::Step::kWantsRead ? POLLIN : POLLOUT,
           "no answer to TLS in time");
    }
  } catch (const Error& e) {
    if (e.err() != EACCES) throw;
    fail(EACCES, e.what());
  }
  tls_ = std::move(session);
}

}  // namespace minivmm::cli
