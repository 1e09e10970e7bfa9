// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/reply_queue.h"

#include <algorithm>
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
  // Whoever waits to be restored holds nothing meanwhile: or all might wait for each other.
  if (shed_ > 0) (void)shed(request);
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
  for (const Request* r = head_; r != nullptr && !r->shed && !r->bare && !gatherer.full();
       r = r->next) {
    gatherer.add(*r);
  }
  return gatherer.count();
}

ReplyQueue::Sent ReplyQueue::send_some() noexcept {
  while (head_ != nullptr) {
    const size_t count = gather();
    // With nothing to send, too, the stream says what it had kept of earlier sends.
    const int64_t n = stream_.try_send(std::span(resources_.iovecs()).first(count));
    if (n == -EAGAIN) {
      (void)end_loans(false);
      return Sent::kBlocked;
    }
    // Lent bytes are not there any more: the file was cut, or its device failed. (Over vsock the
    // kernel calls it ENOMEM.)
    if ((n == -EFAULT || n == -ENOMEM) && end_loans(true)) continue;
    if (n < 0) {
      drop_all();
      return Sent::kAll;
    }
    if (n == 0 && count == 0) return Sent::kBare;
    advance(static_cast<size_t>(n));
  }
  return Sent::kAll;
}

// `for_good`: nothing is borrowed for them again. False: there are none.
bool ReplyQueue::end_loans(bool for_good) noexcept {
  bool any = false;
  for (Request* r = head_; r != nullptr; r = r->next) {
    if (r->loan.data() == nullptr) continue;
    r->end_loan();
    r->no_loan = for_good;
    any = true;
  }
  return any;
}

void ReplyQueue::advance(size_t sent) noexcept {
  bytes_ -= sent;
  sent_ += sent;
  front_sent_ += sent;
  while (head_ != nullptr && !head_->shed) {
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
  if (request.shed) --shed_;
  if (head_ == nullptr) tail_ = nullptr;
  owner_.on_sent(request);
}

void ReplyQueue::drop_all() noexcept {
  broken_ = true;
  while (head_ != nullptr) pop_front();
  bytes_ = 0;
  front_sent_ = 0;
}

bool ReplyQueue::shed(Request& request) noexcept {
  const size_t size = size_of(request);
  if (!owner_.on_shed(request, &request == head_ && front_sent_ > 0)) return false;
  bytes_ = bytes_ - size + size_of(request);
  request.shed = true;
  ++shed_;
  return true;
}

void ReplyQueue::shed_all() noexcept {
  bool any = false;
  for (Request* r = head_; r != nullptr; r = r->next) {
    if (!r->shed && shed(*r)) any = true;
  }
  if (any) patience_ = std::min(2 * patience_, kMostPatience);
}

bool ReplyQueue::restore_front() noexcept {
  const bool was_shed = head_->shed;
  const size_t size = size_of(*head_);
  const bool whole = owner_.on_restore(*head_, front_sent_ > 0);
  if (was_shed && !head_->shed) --shed_;
  bytes_ = bytes_ - size + size_of(*head_);  // it may have become an error
  return whole;
}

// The first reply has to get its data again, once there is room for it. While anything is borrowed
// nothing is waited for: so either replies are borrowed, or one is read.
bool ReplyQueue::refill() noexcept {
  if (head_->shed) {
    (void)stream_.wait_writable(nullptr);
    const bool whole = restore_front();
    progress_ = base::Clock::now();
    return whole;
  }
  bool room = false;
  if (!wait_for_room(room)) return false;
  if (!room || head_->shed) return true;
  size_t bytes = 0;
  for (Request* r = head_; r != nullptr && r->bare && !r->shed && bytes < kRefill; r = r->next) {
    if (!owner_.on_borrow(*r)) break;
    bytes += size_of(*r);
  }
  return bytes > 0 || restore_front();
}

// False: the client is given up.
bool ReplyQueue::wait_for_room(bool& room) noexcept {
  constexpr std::chrono::nanoseconds kTick = std::chrono::seconds(1);
  const auto now = base::Clock::now();
  if (sent_ != sent_then_) progress_ = now;
  sent_then_ = sent_;
  const std::chrono::nanoseconds stalled = now - progress_;
  if (stalled >= patience_ && owner_.memory_is_wanted()) shed_all();
  if (stalled >= kTick && owner_.on_stall(stalled)) return false;
  room = stream_.wait_writable(nullptr, now + std::min(kTick, patience_)) == Stream::Wait::kReady;
  return true;
}

void ReplyQueue::send_rest() noexcept {
  progress_ = base::Clock::now();
  sent_then_ = sent_;
  for (Sent sent = Sent::kBlocked; (sent = send_some()) != Sent::kAll;) {
    bool room = false;
    const bool goes_on = sent == Sent::kBare ? refill() : wait_for_room(room);
    if (!goes_on) {
      stream_.shutdown();
      drop_all();
      break;
    }
  }
  patience_ = kPatience;
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
