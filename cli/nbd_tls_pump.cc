// SPDX-License-Identifier: Apache-2.0
#include "cli/nbd_tls_pump.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <utility>

namespace minivmm::cli {
namespace {

// What one end gets, while nothing moves, when the other is gone.
constexpr std::chrono::seconds kPatience{5};
// In a row, so that the other connections get their turn.
constexpr int kMostRounds = 4;

bool would_wait(int64_t result) noexcept { return result == -EAGAIN || result == -EINTR; }

}  // namespace

NbdTlsPump::NbdTlsPump(base::UniqueFd local, base::UniqueFd far,
                       std::unique_ptr<nbd::TlsSession> tls)
    : local_(std::move(local)), far_(std::move(far)), tls_(std::move(tls)) {}

bool NbdTlsPump::is_saying_bye() const noexcept {
  return local_ended_ && up_.empty() && !is_shut_ && !far_ended_;
}

void NbdTlsPump::say_what_to_poll(pollfd& local, pollfd& far) const noexcept {
  const auto if_so = [](bool so, short event) { return so ? event : short{0}; };
  local = {local_.get(), 0, 0};
  local.events = static_cast<short>(if_so(up_.empty() && !local_ended_ && !far_ended_, POLLIN) |
                                    if_so(!down_.empty() && !local_gone_, POLLOUT));
  // Asked for nothing, poll() still says when the other end is closed, which is to be known once.
  if (local.events == 0 && local_gone_) local.fd = -1;
  far = {far_.get(), 0, 0};
  far.events = static_cast<short>(if_so(down_.empty() && !far_ended_, POLLIN) |
                                  if_so(!up_.empty() || is_saying_bye(), POLLOUT));
  if (far.events == 0) far.fd = -1;
}

bool NbdTlsPump::take_from_local() noexcept {
  if (local_ended_ || far_ended_ || !local_readable_ || !up_.empty()) return false;
  const std::span<std::byte> room = up_.room();
  const ssize_t n = ::recv(local_.get(), room.data(), room.size(), MSG_DONTWAIT);
  if (n > 0) {
    up_.fill(static_cast<size_t>(n));
    return true;
  }
  if (n < 0 && would_wait(-errno)) {
    local_readable_ = false;
  } else {
    local_ended_ = true;
  }
  return local_ended_;
}

bool NbdTlsPump::give_to_far() noexcept {
  if (up_.empty()) return false;
  const std::span<std::byte> rest = up_.rest();
  const iovec part{rest.data(), rest.size()};
  const int64_t n = tls_->try_send({&part, 1});
  if (n > 0) {
    up_.take(static_cast<size_t>(n));
  } else if (!would_wait(n)) {
    // Nothing comes back from a connection that takes nothing.
    far_ended_ = true;
    up_.drop();
  }
  return !would_wait(n);
}

bool NbdTlsPump::take_from_far() noexcept {
  if (far_ended_ || !far_readable_ || !down_.empty()) return false;
  const std::span<std::byte> room = down_.room();
  const iovec part{room.data(), room.size()};
  const int64_t n = tls_->try_receive({&part, 1});
  if (would_wait(n)) {
    far_readable_ = false;
    return false;
  }
  if (n > 0) {
    down_.fill(static_cast<size_t>(n));
    // Read to the end of the connection even so: closing a socket that has something to read tells
    // the server to forget what it was sent last.
    if (local_gone_) down_.drop();
  } else {
    far_ended_ = true;
    up_.drop();
  }
  return true;
}

bool NbdTlsPump::give_to_local() noexcept {
  if (down_.empty()) return false;
  const std::span<std::byte> rest = down_.rest();
  const ssize_t n = ::send(local_.get(), rest.data(), rest.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  if (n > 0) {
    down_.take(static_cast<size_t>(n));
    return true;
  }
  if (n < 0 && would_wait(-errno)) return false;
  local_gone_ = true;
  down_.drop();
  return true;
}

void NbdTlsPump::say_bye() noexcept {
  // Also what TLS had to say by itself and is not out yet.
  if (would_wait(tls_->try_send({}))) return;
  if (!said_bye_) {
    said_bye_ = true;
    tls_->bye();
    if (would_wait(tls_->try_send({}))) return;
  }
  (void)::shutdown(far_.get(), SHUT_WR);
  is_shut_ = true;
}

void NbdTlsPump::look_for_the_end(bool moved) noexcept {
  if (far_ended_ && down_.empty()) {
    ended_ = true;
    return;
  }
  if (!local_ended_ && !local_gone_ && !far_ended_) return;
  const auto now = Clock::now();
  // A server that goes on talking to nobody does not get more time for that.
  const bool again = moved && !local_gone_;
  if (!deadline_ || again) deadline_ = now + kPatience;
  ended_ = now >= *deadline_;
}

void NbdTlsPump::work(short local_events, short far_events) noexcept {
  constexpr short kBroken = POLLHUP | POLLERR | POLLNVAL;
  if ((local_events & kBroken) != 0 && !local_gone_) {
    local_gone_ = true;
    down_.drop();
  }
  if ((local_events & (POLLIN | kBroken)) != 0) local_readable_ = true;
  if ((far_events & (POLLIN | kBroken)) != 0) far_readable_ = true;
  bool moved = false;
  has_more_ = true;
  for (int round = 0; round < kMostRounds && has_more_; ++round) {
    has_more_ = take_from_local();
    has_more_ |= give_to_far();
    has_more_ |= take_from_far();
    has_more_ |= give_to_local();
    moved |= has_more_;
  }
  if (is_saying_bye()) say_bye();
  look_for_the_end(moved);
}

}  // namespace minivmm::cli
