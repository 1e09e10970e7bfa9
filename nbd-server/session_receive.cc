// SPDX-License-Identifier: Apache-2.0
// How a session comes by what its client says: its turns, the memory for what is said, payloads,
// and the waiting for all of that.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "nbd-server/session.h"

namespace minivmm::nbd {
namespace {

constexpr const char* kServerEnds = "the server ended the session";

}  // namespace

// The session's fiber waits: from here on replies go out without it, and memory that it does not
// use is others'.
class Session::Pause {
 public:
  explicit Pause(Session& session) noexcept : session_(session) {
    session_.in_batch_ = false;
    session_.replies_.flush();
    session_.account_.set_eager(true);
  }
  ~Pause() {
    session_.in_batch_ = true;
    session_.account_.set_eager(false);
  }
  Pause(const Pause&) = delete;
  Pause& operator=(const Pause&) = delete;

 private:
  Session& session_;
};

// --- memory ---

// It has to see replies on their way first. A client that does not read gets, while it does not, a
// part of what is free that shrinks with the number of such clients: they leave room for those who
// read.
bool Session::holds_too_much(uint64_t bytes) noexcept {
  if (replies_.sheds()) return true;
  if (account_.used() == 0) return false;
  if (bytes > kLargeRequest && large_ > 0 && large_ + bytes > kMostLarge) return true;
  if (!replies_.blocked()) return false;
  if (in_hand() >= kMostUnread) return true;
  return account_.used() + bytes > std::max(kUnread, account_.budgets().open().spare() / 2);
}

bool Session::wait_for_memory(uint64_t bytes) {
  const Pause pause(*this);
  input_.park();
  while (!is_over()) {
    if (!holds_too_much(bytes)) {
      if (account_.try_take(bytes)) return true;
      if (account_.within_limit(bytes)) {
        if (account_.wait(bytes, until_over())) return true;
        continue;
      }
    }
    memory_.wait("the client to read its replies");
  }
  return false;
}

// --- payloads of writes ---

bool Session::take_payload(Request& request) {
  const size_t length = request.head.payload;
  if (length == 0) return true;
  const size_t have = std::min(length, input_.size());
  large_mode_ = length > kLargePayload;
  if (have == length) {
    // SAFETY: the block is received into only behind this payload.
    request.payload = const_cast<std::byte*>(input_.data());
    request.block = &input_.pin();
    input_.consume(length);
    return true;
  }
  request.buffer = resources_.buffers().take(length);
  request.payload = request.buffer.data();
  if (have > 0) std::memcpy(request.payload, input_.data(), have);
  input_.consume(have);
  return receive_payload(request, have);
}

// What comes behind the payload is received with it.
bool Session::receive_payload(Request& request, size_t have) {
  Progress progress;
  std::span<std::byte> rest(request.payload + have, request.head.payload - have);
  while (!rest.empty()) {
    iovec parts[2] = {{rest.data(), rest.size()},
                      input_.room(large_mode_ ? header_size_ : SIZE_MAX)};
    size_t n = 0;
    const size_t count = parts[1].iov_len > 0 ? 2 : 1;
    if (!receive_into({parts, count}, n, &progress)) return false;
    const size_t mine = std::min(n, rest.size());
    rest = rest.subspan(mine);
    if (n > mine) input_.received(n - mine);
  }
  return true;
}

bool Session::skip_payload(uint64_t length) {
  const uint64_t have = std::min<uint64_t>(length, input_.size());
  input_.consume(have);
  length -= have;
  while (length > 0) {
    iovec room = input_.room(static_cast<size_t>(std::min<uint64_t>(length, SIZE_MAX)));
    std::byte sink[512];
    if (room.iov_len == 0) room = {sink, std::min<size_t>(sizeof sink, length)};
    size_t n = 0;
    if (!receive_into({&room, 1}, n)) return false;
    length -= n;
  }
  return true;
}

// --- input ---

// A client that always has more to say keeps neither others from the loop nor the loop from ending
// its session.
bool Session::take_turn() {
  if (receives_ >= kReceivesPerTurn || taken_ >= kRequestsPerTurn) {
    receives_ = 0;
    taken_ = 0;
    loop_.yield();
  }
  if (!is_over()) return true;
  end(kServerEnds);
  return false;
}

// Whether the session goes on on another loop: between two requests, with nothing in hand.
bool Session::leaves(bool alternating) noexcept {
  if (!placement_.note(alternating)) return false;
  if (in_hand() > 0 || input_.size() > 0 || cancel_.cancelled()) return false;
  const auto now = base::Clock::now();
  if (!placement_.decide(now, std::max(loop_.last_idle(), resources_.left()))) return false;
  if (placement_.away()) resources_.leave(now);
  outcome_ = nullptr;
  return true;
}

bool Session::receive() {
  send_replies();
  const size_t taken = pace_.receives(counters_.requests.load(std::memory_order_relaxed));
  if (leaves(taken == 1 && small_)) return false;
  ++receives_;
  if (!take_turn()) return false;
  // Who was waited for and then sent one request is waited for again. TLS may have it already.
  bool waits = std::exchange(waited_, false) && taken == 1 && stream_.tls() == nullptr;
  for (;;) {
    iovec room = input_.room(large_mode_ ? header_size_ - input_.size() : SIZE_MAX);
    large_mode_ = false;
    if (room.iov_len == 0) {
      // Every block is held by writes that run.
      const Pause pause(*this);
      memory_.wait("writes to end");
      if (is_over()) return false;
      continue;
    }
    size_t n = 0;
    const int64_t tried = std::exchange(waits, false) ? -EAGAIN : try_receive({&room, 1});
    if (tried == -EAGAIN) {
      waited_ = true;
      pace_.waits();
      input_.idle();
      if (!wait_readable()) return false;
      continue;
    }
    if (tried <= 0) return false;
    n = static_cast<size_t>(tried);
    input_.received(n);
    note_receive();
    return true;
  }
}

int64_t Session::try_receive(std::span<iovec> to) noexcept {
  const int64_t n = stream_.try_receive(to);
  if (n == -EAGAIN) pace_.waits();
  return n;
}

void Session::note_receive() noexcept {
  if (!resources_.served_before(*this)) {
    alone_ = 0;
  } else if (alone_ < kAloneReceives) {
    ++alone_;
  }
}

// Receives at least a byte into buffers that stay. False: the session ends.
bool Session::receive_into(std::span<iovec> to, size_t& received, Progress* progress) {
  for (;;) {
    const int64_t n = try_receive(to);
    if (n > 0) {
      received = static_cast<size_t>(n);
      if (progress != nullptr) progress->bytes += received;
      return take_turn();
    }
    if (n != -EAGAIN || !wait_readable(progress)) return false;
  }
}

bool Session::stalls(const Progress& progress, base::Clock::time_point now) noexcept {
  return now - progress.since >= options_.stall_limit && account_.budgets().contended();
}

bool Session::wait_readable(Progress* progress) {
  using std::chrono::milliseconds;
  const auto tick = std::clamp(options_.stall_limit, milliseconds(10), milliseconds(1000));
  const Pause pause(*this);
  receives_ = 0;
  auto now = base::Clock::now();
  auto silent_since = now;
  if (progress != nullptr && progress->bytes >= kLeastProgress) *progress = {now, 0};
  for (;;) {
    std::optional<base::Clock::time_point> deadline;
    if (options_.idle_limit.count() > 0) deadline = silent_since + options_.idle_limit;
    if (progress != nullptr) {
      if (stalls(*progress, now)) {
        end("it announced data and did not send them, while others waited for the memory");
        return false;
      }
      deadline = deadline ? std::min(*deadline, now + tick) : now + tick;
    }
    const auto result = stream_.wait_readable(&until_over(), deadline);
    if (result == Stream::Wait::kReady) return true;
    if (result == Stream::Wait::kCancelled && is_over()) {
      end(kServerEnds);
      return false;
    }
    now = base::Clock::now();
    if (in_flight_ > 0) {
      silent_since = now;
    } else if (options_.idle_limit.count() > 0 && now - silent_since >= options_.idle_limit) {
      end("it was silent for too long");
      return false;
    }
  }
}

}  // namespace minivmm::nbd
