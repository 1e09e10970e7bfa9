// SPDX-License-Identifier: Apache-2.0
#include "bare_connection.h"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "clock.h"
#include "nbd_handshake.h"
#include "nbd_socket.h"

namespace minivmm::bench {
namespace {

constexpr std::size_t kBuffer = 8 << 20;
constexpr std::size_t kMaxRequest = 4 << 20;
constexpr std::uint64_t kRecvTag = 1;
constexpr std::uint64_t kSendTag = 2;
constexpr std::uint32_t kNbdEio = 5;

}  // namespace

BareConnection::BareConnection(base::UniqueFd socket, const BareFile& file,
                               const BareOptions& options)
    : socket_(std::move(socket)), file_(file), options_(options), in_(kBuffer), out_(kBuffer) {
  tune_stream(socket_.get());
  if (options_.receive == BareReceive::kEpoll) {
    epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
    epoll_event event{};
    event.events = EPOLLIN;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, socket_.get(), &event) != 0) {
      throw base::errno_error(errno, "epoll_ctl");
    }
  }
  if (options_.receive == BareReceive::kRing || options_.io == BareIo::kRing ||
      options_.send == BareSend::kRing) {
    ring_ = std::make_unique<Ring>(256);
  }
}

void BareConnection::serve() {
  NbdExport offered;
  offered.size = file_.size;
  offered.flags = kTransmitHasFlags | kTransmitFlush | kTransmitMultiConn;
  if (!handshake_as_server(socket_.get(), offered)) return;
  while (open_ && receive()) {
    while (open_ && take_batch()) {
      plan_replies();
      do_io();
      reply();
    }
    compact();
  }
}

// --- receiving -----------------------------------------------------------------------------

bool BareConnection::receive() {
  std::int64_t n = 0;
  if (options_.receive == BareReceive::kRing) {
    n = receive_by_ring();
  } else if (options_.spin_us > 0 || options_.receive == BareReceive::kEpoll) {
    n = receive_spinning();
  } else {
    n = ::recv(socket_.get(), in_.data() + end_, in_.size() - end_, 0);
  }
  if (n <= 0) return false;
  end_ += static_cast<std::size_t>(n);
  return true;
}

// Tries without waiting, for spin_us, before it sleeps.
std::int64_t BareConnection::receive_spinning() {
  std::uint64_t deadline = 0;
  for (;;) {
    const ssize_t n = ::recv(socket_.get(), in_.data() + end_, in_.size() - end_, MSG_DONTWAIT);
    if (n >= 0 || errno != EAGAIN) return n;
    const std::uint64_t now = now_ns();
    if (deadline == 0) deadline = now + options_.spin_us * 1000U;
    if (now < deadline) continue;
    if (!wait_readable()) return -1;
  }
}

bool BareConnection::wait_readable() {
  if (epoll_) {
    epoll_event event{};
    return ::epoll_wait(epoll_.get(), &event, 1, -1) == 1;
  }
  char byte;
  return ::recv(socket_.get(), &byte, 1, MSG_PEEK) == 1;
}

// The waiting replies and the next receive go down in one system call.
std::int64_t BareConnection::receive_by_ring() {
  if (ring_send_ > 0) {
    io_uring_sqe* s = ring_->sqe();
    io_uring_prep_send(s, socket_.get(), out_.data(), ring_send_, MSG_NOSIGNAL | MSG_WAITALL);
    s->user_data = kSendTag;
  }
  io_uring_sqe* r = ring_->sqe();
  io_uring_prep_recv(r, socket_.get(), in_.data() + end_, in_.size() - end_, 0);
  r->user_data = kRecvTag;
  unsigned left = ring_send_ > 0 ? 2 : 1;
  std::int64_t received = 0;
  while (left > 0) {
    ring_->submit(1);
    left -= ring_->reap([&](std::uint64_t tag, int result, unsigned) {
      if (tag == kRecvTag) received = result;
      if (tag == kSendTag && result != static_cast<int>(ring_send_)) open_ = false;
    });
  }
  ring_send_ = 0;
  return received;
}

void BareConnection::compact() {
  if (begin_ == end_) {
    begin_ = end_ = 0;
  } else if (in_.size() - begin_ < kMaxRequest + kRequestSize) {
    std::memmove(in_.data(), in_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
}

// --- requests ------------------------------------------------------------------------------

// The complete requests in in_, as many as one send may answer. False: none.
bool BareConnection::take_batch() {
  batch_.clear();
  std::size_t replies = 0;
  while (end_ - begin_ >= kRequestSize && batch_.size() < options_.max_batch) {
    Pending p;
    if (!decode_request(in_.data() + begin_, p.request)) {
      throw base::Error(EPROTO, "a request without its magic");
    }
    const NbdRequest& r = p.request;
    if (r.type == kCmdDisc) {
      open_ = false;
      break;
    }
    if (r.length > kMaxRequest || r.offset > file_.size || r.length > file_.size - r.offset) {
      throw base::Error(EINVAL, "a request out of range");
    }
    const std::size_t need = kRequestSize + (r.type == kCmdWrite ? r.length : 0);
    const std::size_t answer = kSimpleReplySize + (r.type == kCmdRead ? r.length : 0);
    if (end_ - begin_ < need || replies + answer > out_.size()) break;
    p.payload = in_.data() + begin_ + kRequestSize;
    begin_ += need;
    replies += answer;
    batch_.push_back(p);
  }
  return !batch_.empty();
}

// Joined: each read's data lands right behind its reply header, so that one flat send does.
void BareConnection::plan_replies() {
  out_size_ = 0;
  for (Pending& p : batch_) {
    out_size_ += kSimpleReplySize;
    if (p.request.type != kCmdRead) continue;
    p.data = out_.data() + out_size_;
    out_size_ += p.request.length;
  }
}

void BareConnection::do_io() {
  if (options_.io == BareIo::kRing) {
    do_io_by_ring();
  } else {
    for (Pending& p : batch_) do_one(p);
  }
}

void BareConnection::do_one(Pending& p) {
  const NbdRequest& r = p.request;
  const auto offset = static_cast<off_t>(r.offset);
  std::int64_t n = r.length;
  if (r.type == kCmdFlush) {
    n = ::fdatasync(file_.fd) == 0 ? n : -1;
  } else if (options_.io == BareIo::kNone) {
    // No I/O: what the socket alone costs.
  } else if (r.type == kCmdWrite) {
    n = ::pwrite(file_.fd, p.payload, r.length, offset);
  } else if (options_.io == BareIo::kMapped) {
    std::memcpy(p.data, file_.mapped + r.offset, r.length);
  } else if (options_.io == BareIo::kNowait) {
    const iovec iov{p.data, r.length};
    n = ::preadv2(file_.fd, &iov, 1, offset, RWF_NOWAIT);
    if (n != static_cast<std::int64_t>(r.length)) {
      n = ::pread(file_.fd, p.data, r.length, offset);
    }
  } else {
    n = ::pread(file_.fd, p.data, r.length, offset);
  }
  if (n != static_cast<std::int64_t>(r.length)) p.error = kNbdEio;
}

void BareConnection::do_io_by_ring() {
  unsigned left = 0;
  for (std::size_t i = 0; i < batch_.size(); ++i) {
    Pending& p = batch_[i];
    if (p.request.type == kCmdFlush) {
      do_one(p);
      continue;
    }
    io_uring_sqe* e = ring_->sqe();
    if (p.request.type == kCmdWrite) {
      io_uring_prep_write(e, file_.fd, p.payload, p.request.length, p.request.offset);
    } else {
      io_uring_prep_read(e, file_.fd, p.data, p.request.length, p.request.offset);
    }
    e->user_data = i;
    ++left;
  }
  while (left > 0) {
    ring_->submit(left);
    left -= ring_->reap([&](std::uint64_t i, int result, unsigned) {
      if (result != static_cast<int>(batch_[i].request.length)) batch_[i].error = kNbdEio;
    });
  }
}

// --- replies -------------------------------------------------------------------------------

void BareConnection::reply() {
  if (options_.send == BareSend::kGathered) return reply_gathered();
  char* at = out_.data();
  for (const Pending& p : batch_) {
    encode_simple_reply(at, p.error, p.request.cookie);
    at += kSimpleReplySize;
    if (p.request.type == kCmdRead) at += p.request.length;
  }
  if (options_.send == BareSend::kRing && begin_ == end_) {
    ring_send_ = out_size_;  // goes with the next receive
  } else {
    send_all(socket_.get(), out_.data(), out_size_);
  }
}

// The same bytes, as an iovec a header and an iovec a payload.
void BareConnection::reply_gathered() {
  iov_.clear();
  char* at = out_.data();
  for (const Pending& p : batch_) {
    encode_simple_reply(at, p.error, p.request.cookie);
    iov_.push_back({at, kSimpleReplySize});
    at += kSimpleReplySize;
    if (p.request.type != kCmdRead) continue;
    iov_.push_back({p.data, p.request.length});
    at += p.request.length;
  }
  msghdr message{};
  message.msg_iov = iov_.data();
  message.msg_iovlen = iov_.size();
  const ssize_t n = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
  if (n < 0) throw base::errno_error(errno, "cannot send");
  const auto sent = static_cast<std::size_t>(n);
  if (sent < out_size_) send_all(socket_.get(), out_.data() + sent, out_size_ - sent);
}

}  // namespace minivmm::bench
