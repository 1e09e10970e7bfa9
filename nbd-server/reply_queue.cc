// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/reply_queue.h"

#include <cerrno>

namespace minivmm::nbd {
namespace {

size_t size_of(const Request::Piece& piece) noexcept {
  return size_t{piece.header_size} + piece.data_size;
}

size_t size_of(const Request& request) noexcept {
  size_t out = size_of(request.reply);
  for (const Request::Piece& piece : request.more) out += size_of(piece);
  return out;
}

// Fills iovecs from the front of the queue, leaving out what has been sent.
class Gatherer {
 public:
  Gatherer(std::span<iovec> to, size_t skip) noexcept : to_(to), skip_(skip) {}

  bool full() const noexcept { return count_ == to_.size(); }
  size_t count() const noexcept { return count_; }

  void add(const Request& request) noexcept {
    add(request.reply);
    for (const Request::Piece& piece : request.more) add(piece);
  }

 private:
  void add(const Request::Piece& piece) noexcept {
    add(piece.header.data(), piece.header_size);
    add(piece.data, piece.data_size);
  }
  void add(const std::byte* data, size_t size) noexcept {
    if (skip_ >= size) {
      skip_ -= size;
      return;
    }
    if (full()) return;
    // SAFETY: sending only reads.
    to_[count_++] = {const_cast<std::byte*>(data) + skip_, size - skip_};
    skip_ = 0;
  }

  std::span<iovec> to_;
  size_t count_ = 0;
  size_t skip_;
};

}  // namespace

void ReplyQueue::push(Request& request) noexcept {
  request.next = nullptr;
  if (broken_) {
    owner_.on_sent(request);
    return;
  }
  ++count_;
  bytes_ += size_of(request);
  (tail_ != nullptr ? tail_->next : head_) = &request;
  tail_ = &request;
}

void ReplyQueue::flush() noexcept {
  if (head_ == nullptr || sending_) return;
  if (send_some() == Sent::kAll) return;
  sending_ = true;
  try {
    loop_.spawn("nbd replies", [this] { send_rest(); });
  } catch (const std::bad_alloc&) {
    // Without a stack to wait on this client cannot be served further.
    sending_ = false;
    stream_.shutdown();
    drop_all();
  }
}

void ReplyQueue::flush_soon() noexcept {
  if (flush_posted_ || sending_ || head_ == nullptr) return;
  flush_posted_ = true;
  try {
    loop_.spawn("nbd flush", [this] {
      flush_posted_ = false;
      flush();
      after();
    });
  } catch (const std::bad_alloc&) {
    flush_posted_ = false;
    flush();
  }
}

size_t ReplyQueue::gather() noexcept {
  Gatherer gatherer(resources_.iovecs(), front_sent_);
  for (const Request* r = head_; r != nullptr && !gatherer.full(); r = r->next) gatherer.add(*r);
  return gatherer.count();
}

ReplyQueue::Sent ReplyQueue::send_some() noexcept {
  while (head_ != nullptr) {
    const int64_t n = stream_.try_send(std::span(resources_.iovecs()).first(gather()));
    if (n == -EAGAIN) return Sent::kBlocked;
    if (n < 0) {
      drop_all();
      return Sent::kAll;
    }
    advance(static_cast<size_t>(n));
  }
  return Sent::kAll;
}

void ReplyQueue::advance(size_t sent) noexcept {
  bytes_ -= sent;
  front_sent_ += sent;
  while (head_ != nullptr) {
    const size_t size = size_of(*head_);
    if (front_sent_ < size) return;
    front_sent_ -= size;
    pop_front();
  }
}

void ReplyQueue::pop_front() noexcept {
  Request& request = *head_;
  head_ = request.next;
  --count_;
  if (head_ == nullptr) tail_ = nullptr;
  owner_.on_sent(request);
}

void ReplyQueue::drop_all() noexcept {
  broken_ = true;
  while (head_ != nullptr) pop_front();
  bytes_ = 0;
  front_sent_ = 0;
}

void ReplyQueue::send_rest() noexcept {
  constexpr auto kTick = std::chrono::seconds(1);
  auto progress = base::Clock::now();
  size_t left = bytes_;
  while (send_some() == Sent::kBlocked) {
    const auto now = base::Clock::now();
    if (bytes_ != left) progress = now;
    left = bytes_;
    if (now - progress >= kTick && owner_.on_stall(now - progress)) {
      stream_.shutdown();
      drop_all();
      break;
    }
    (void)stream_.wait_writable(nullptr, now + kTick);
  }
  sending_ = false;
  after();
}

void ReplyQueue::after() noexcept {
  if (head_ == nullptr && !sending_ && !flush_posted_) empty_.notify();
}

void ReplyQueue::wait_empty() noexcept {
  flush();
  while (head_ != nullptr || sending_ || flush_posted_) empty_.wait("replies to be sent");
}

}  // namespace minivmm::nbd
