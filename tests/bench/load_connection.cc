// SPDX-License-Identifier: Apache-2.0
#include "load_connection.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include <limits.h>

#include "base/error.h"
#include "clock.h"
#include "nbd_socket.h"

namespace minivmm::bench {
namespace {

constexpr std::size_t kSmallBuffer = 256 << 10;
constexpr std::size_t kLargeBuffer = 4 << 20;
constexpr std::size_t kMaxErrorText = 4096;

}  // namespace

LoadConnection::LoadConnection(base::UniqueFd socket, const NbdExport& what, LoadPlan plan,
                               std::size_t block_size, unsigned depth, LoadModel* model)
    : socket_(std::move(socket)),
      structured_(what.structured),
      plan_(plan),
      block_size_(block_size),
      model_(model),
      slots_(depth),
      in_flight_(depth),
      pattern_(block_size),
      in_(block_size > 32768 ? kLargeBuffer : kSmallBuffer) {
  for (unsigned i = depth; i-- > 0;) free_.push_back(i);
  for (std::size_t i = 0; i < pattern_.size(); ++i) {
    pattern_[i] = static_cast<char>((i * 2654435761U) >> 13);
  }
}

// --- requests ------------------------------------------------------------------------------

void LoadConnection::fill(std::uint64_t now) {
  while (!free_.empty()) {
    const auto op = plan_.next();
    if (!op) return;
    const std::uint32_t index = free_.back();
    free_.pop_back();
    queue(index, *op, now);
  }
}

void LoadConnection::queue(std::uint32_t index, const LoadOp& op, std::uint64_t now) {
  Slot& slot = slots_[index];
  slot.op = op;
  slot.start = now;
  slot.failed = false;
  in_flight_[index] = true;
  NbdRequest request;
  request.type = op.write ? kCmdWrite : kCmdRead;
  request.cookie = index;
  request.offset = op.block * block_size_;
  request.length = static_cast<std::uint32_t>(block_size_);
  encode_request(slot.header, request);
  iov_.push_back({slot.header, kRequestSize});
  if (model_ != nullptr) slot.data.resize(block_size_);
  if (!op.write) return;
  if (model_ != nullptr) model_->fill_next(op.block, slot.data.data());
  iov_.push_back({model_ != nullptr ? slot.data.data() : pattern_.data(), block_size_});
}

void LoadConnection::send() {
  while (wants_to_send()) {
    msghdr message{};
    message.msg_iov = iov_.data() + next_iov_;
    message.msg_iovlen = std::min<std::size_t>(iov_.size() - next_iov_, IOV_MAX);
    const ssize_t n = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    ++stats_.sends;
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) throw base::errno_error(errno, "cannot send requests");
    auto sent = static_cast<std::size_t>(n);
    while (sent > 0) {
      iovec& v = iov_[next_iov_];
      const std::size_t part = std::min(sent, v.iov_len);
      v.iov_base = static_cast<char*>(v.iov_base) + part;
      v.iov_len -= part;
      sent -= part;
      if (v.iov_len == 0) ++next_iov_;
    }
  }
  iov_.clear();
  next_iov_ = 0;
}

void LoadConnection::disconnect() {
  char raw[kRequestSize];
  NbdRequest request;
  request.type = kCmdDisc;
  encode_request(raw, request);
  send_all(socket_.get(), raw, sizeof raw);
}

// --- replies -------------------------------------------------------------------------------

bool LoadConnection::receive(bool wait) {
  const ssize_t n =
      ::recv(socket_.get(), in_.data() + in_size_, in_.size() - in_size_, wait ? 0 : MSG_DONTWAIT);
  ++stats_.receives;
  if (n < 0 && errno == EAGAIN) {
    if (wait) throw base::Error(ETIMEDOUT, "the server stays silent");
    return false;
  }
  if (n < 0) throw base::errno_error(errno, "cannot receive replies");
  if (n == 0) throw base::Error(ECONNRESET, "the server ended the connection");
  in_size_ += static_cast<std::size_t>(n);
  parse(now_ns());
  return true;
}

void LoadConnection::parse(std::uint64_t now) {
  std::size_t at = 0;
  while (at < in_size_) {
    const std::size_t left = in_size_ - at;
    if (data_left_ > 0) {
      const std::size_t part = std::min(left, data_left_);
      take_data(in_.data() + at, part, now);
      at += part;
      continue;
    }
    const std::size_t used = parse_header(in_.data() + at, left, now);
    if (used == 0) break;
    at += used;
  }
  in_size_ -= at;
  if (in_size_ > 0 && at > 0) std::memmove(in_.data(), in_.data() + at, in_size_);
}

// Bytes used; 0: the header has not come whole.
std::size_t LoadConnection::parse_header(const char* p, std::size_t size, std::uint64_t now) {
  if (size < kSimpleReplySize) return 0;
  const auto magic = base::load_be<std::uint32_t>(p);
  if (magic == kSimpleReplyMagic) return parse_simple(p, now);
  if (magic == kStructuredReplyMagic && structured_) return parse_chunk(p, size, now);
  throw base::Error(EPROTO, "a reply without its magic");
}

std::size_t LoadConnection::parse_simple(const char* p, std::uint64_t now) {
  const std::uint32_t index = slot_of(base::load_be<std::uint64_t>(p + 8));
  Slot& slot = slots_[index];
  slot.failed = base::load_be<std::uint32_t>(p + 4) != 0;
  if (!slot.op.write && structured_ && !slot.failed) {
    throw base::Error(EPROTO, "a simple reply to a read after structured ones were agreed");
  }
  if (slot.op.write || slot.failed) {
    complete(index, now);
  } else {
    begin_data(index, 0, block_size_, true);
  }
  return kSimpleReplySize;
}

std::size_t LoadConnection::parse_chunk(const char* p, std::size_t size, std::uint64_t now) {
  if (size < kChunkHeaderSize) return 0;
  const bool done = (base::load_be<std::uint16_t>(p + 4) & kChunkDone) != 0;
  const auto type = base::load_be<std::uint16_t>(p + 6);
  const std::uint32_t index = slot_of(base::load_be<std::uint64_t>(p + 8));
  const std::size_t length = base::load_be<std::uint32_t>(p + 16);
  Slot& slot = slots_[index];
  if ((type & kChunkErrorBit) != 0) {
    if (length > kMaxErrorText) throw base::Error(EPROTO, "an error chunk that is too long");
    slot.failed = true;
    begin_data(index, block_size_, length, done);
    return kChunkHeaderSize;
  }
  if (type == kChunkNone) {
    if (done) complete(index, now);
    return kChunkHeaderSize;
  }
  const std::size_t head = type == kChunkOffsetData ? 8 : 12;
  if ((type != kChunkOffsetData && type != kChunkOffsetHole) || length < head) {
    throw base::Error(EPROTO, "a reply chunk of an unexpected type or length");
  }
  if (size < kChunkHeaderSize + head) return 0;
  const std::uint64_t at = base::load_be<std::uint64_t>(p + 20) - slot.op.block * block_size_;
  const std::size_t bytes =
      type == kChunkOffsetData ? length - 8 : base::load_be<std::uint32_t>(p + 28);
  if (at > block_size_ || bytes > block_size_ - at) {
    throw base::Error(EPROTO, "a reply chunk outside its request");
  }
  if (type == kChunkOffsetData) {
    begin_data(index, at, bytes, done);
  } else {
    if (model_ != nullptr) std::memset(slot.data.data() + at, 0, bytes);
    if (done) complete(index, now);
  }
  return kChunkHeaderSize + head;
}

void LoadConnection::begin_data(std::uint32_t slot, std::size_t at, std::size_t length, bool last) {
  data_slot_ = slot;
  data_at_ = at;
  data_left_ = length;
  data_last_ = last;
}

void LoadConnection::take_data(const char* p, std::size_t size, std::uint64_t now) {
  Slot& slot = slots_[data_slot_];
  if (model_ != nullptr && data_at_ < block_size_) {
    std::memcpy(slot.data.data() + data_at_, p, size);
  }
  data_at_ += size;
  data_left_ -= size;
  if (data_left_ == 0 && data_last_) complete(data_slot_, now);
}

void LoadConnection::complete(std::uint32_t index, std::uint64_t now) {
  Slot& slot = slots_[index];
  in_flight_[index] = false;
  free_.push_back(index);
  stats_.latency.add(now - slot.start);
  if (slot.failed) ++stats_.errors;
  if (model_ == nullptr) return;
  model_->set_busy(slot.op.block, false);
  if (slot.op.write || slot.failed || model_->check(slot.op.block, slot.data.data())) return;
  if (++stats_.mismatches <= 3) {
    std::fprintf(stderr, "nbd_load: offset %llu does not hold what was written\n",
                 static_cast<unsigned long long>(slot.op.block * block_size_));
  }
}

std::uint32_t LoadConnection::slot_of(std::uint64_t cookie) const {
  if (cookie >= slots_.size() || !in_flight_[static_cast<std::size_t>(cookie)]) {
    throw base::Error(EPROTO, "a reply to no request");
  }
  return static_cast<std::uint32_t>(cookie);
}

}  // namespace minivmm::bench
