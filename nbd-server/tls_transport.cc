// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/tls_transport.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "nbd-server/gnutls.h"

namespace minivmm::nbd {
namespace {

// What gathers, of whichever session this thread is sending for: nothing waits between begin() and
// end(), so that one buffer does for all.
std::vector<std::byte>& gathered() noexcept {
  thread_local std::vector<std::byte> bytes;
  return bytes;
}

// What one receive brings, for whichever session this thread receives. Not in the thread's own
// storage, of which every thread of the process would have this much.
std::byte* received(size_t size) noexcept {
  thread_local const std::unique_ptr<std::byte[]> bytes(new (std::nothrow) std::byte[size]);
  return bytes.get();
}

}  // namespace

TlsTransport::Receiving::~Receiving() {
  TlsTransport& t = transport_;
  t.wanted_ = 0;
  const auto left = static_cast<size_t>(t.in_end_ - t.in_begin_);
  if (left == 0) {
    t.in_.reset();
    t.in_begin_ = t.in_end_ = nullptr;
    return;
  }
  if (t.in_) return;  // of an earlier turn
  t.in_.reset(new (std::nothrow) std::byte[left]);
  if (t.in_) {
    std::memcpy(t.in_.get(), t.in_begin_, left);
  } else {
    t.broken_ = true;
  }
  t.in_begin_ = t.in_.get();
  t.in_end_ = t.in_ ? t.in_begin_ + left : nullptr;
}

void TlsTransport::attach(gnutls_session_int* session) noexcept {
  session_ = session;
  const GnutlsApi& api = gnutls_api();
  api.transport_set_ptr(session, this);
  api.transport_set_pull_function(session, [](void* self, void* to, size_t size) {
    return static_cast<TlsTransport*>(self)->pull(static_cast<std::byte*>(to), size);
  });
  api.transport_set_push_function(session, [](void* self, const void* from, size_t size) {
    return static_cast<TlsTransport*>(self)->push(static_cast<const std::byte*>(from), size);
  });
}

// Nothing is left: one receive. Bytes, 0 at the end of the stream, or -1.
ssize_t TlsTransport::receive() noexcept {
  in_.reset();
  in_begin_ = in_end_ = nullptr;
  more_ = false;
  // (Outside of a turn nothing could be kept; nothing asks then.)
  std::byte* const to = broken_ || wanted_ == 0 ? nullptr : received(kInput);
  if (to == nullptr) {
    gnutls_api().transport_set_errno(session_, ENOMEM);
    return -1;
  }
  const size_t records = (wanted_ + kRecord - 1) / kRecord;
  const size_t size = std::min(kInput, wanted_ + records * kRecordOverhead);
  const ssize_t n = ::recv(socket_, to, size, MSG_DONTWAIT);
  if (n < 0) gnutls_api().transport_set_errno(session_, errno);
  if (n <= 0) return n;
  more_ = static_cast<size_t>(n) == size;
  in_begin_ = to;
  in_end_ = to + n;
  return n;
}

ssize_t TlsTransport::pull(std::byte* to, size_t size) noexcept {
  if (in_begin_ == in_end_) {
    if (const ssize_t n = receive(); n <= 0) return n;
  }
  const size_t n = std::min(size, static_cast<size_t>(in_end_ - in_begin_));
  std::memcpy(to, in_begin_, n);
  in_begin_ += n;
  return static_cast<ssize_t>(n);
}

ssize_t TlsTransport::send(const std::byte* from, size_t size) noexcept {
  for (;;) {
    const ssize_t n = ::send(socket_, from, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0 || errno != EINTR) return n;
  }
}

bool TlsTransport::append(std::vector<std::byte>& to, const std::byte* from, size_t size) noexcept {
  try {
    if (to.size() + size > kMostKept) throw std::bad_alloc();
    to.insert(to.end(), from, from + size);
    return true;
  } catch (const std::bad_alloc&) {
    gnutls_api().transport_set_errno(session_, ENOMEM);
    return false;
  }
}

ssize_t TlsTransport::push(const std::byte* from, size_t size) noexcept {
  const auto whole = static_cast<ssize_t>(size);
  if (gathers_) return append(gathered(), from, size) ? whole : -1;
  if (keeps_ && pending()) return append(out_, from, size) ? whole : -1;
  ssize_t n = send(from, size);
  const bool full = n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
  if (keeps_ && (n >= 0 || full)) {
    n = std::max<ssize_t>(n, 0);
    return append(out_, from + n, size - static_cast<size_t>(n)) ? whole : -1;
  }
  if (n < 0) gnutls_api().transport_set_errno(session_, errno);
  return n;
}

void TlsTransport::begin() noexcept {
  gathers_ = true;
  gathered().clear();
}

int TlsTransport::end() noexcept {
  gathers_ = false;
  const std::vector<std::byte>& all = gathered();
  if (all.empty()) return 0;
  const ssize_t n = send(all.data(), all.size());
  if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) return -errno;
  const auto sent = static_cast<size_t>(std::max<ssize_t>(n, 0));
  if (!append(out_, all.data() + sent, all.size() - sent)) return -ENOMEM;
  return pending() ? -EAGAIN : 0;
}

bool TlsTransport::has_room() const noexcept {
  pollfd socket{socket_, POLLOUT, 0};
  return ::poll(&socket, 1, 0) > 0;
}

int TlsTransport::flush() noexcept {
  size_t sent = 0;
  while (sent < out_.size()) {
    const ssize_t n = send(out_.data() + sent, out_.size() - sent);
    if (n < 0) {
      const int error = errno == EWOULDBLOCK ? EAGAIN : errno;
      out_.erase(out_.begin(), out_.begin() + static_cast<ptrdiff_t>(sent));
      return -error;
    }
    sent += static_cast<size_t>(n);
  }
  out_ = {};
  return 0;
}

}  // namespace minivmm::nbd
