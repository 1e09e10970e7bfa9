// SPDX-License-Identifier: Apache-2.0
#include "fuse/channel.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/io.h"
#include "base/log.h"
#include "fuse/kernel_abi.h"
#include "fuse/reply_errno.h"
#include "fuse/session.h"

namespace minivmm::fuse {
namespace {

// Before it reads the next request a channel has at most so many, and so many bytes of data, in
// flight: what is beyond waits in the kernel, which charges it to whoever sent it.
constexpr uint64_t kMaxInFlight = 128;
constexpr uint64_t kMaxBytesInFlight = uint64_t{32} << 20;
// Requests that are read before other fibers of the loop get their turn.
constexpr unsigned kReadsPerTurn = 32;
// Idle buffers that keep their memory.
constexpr size_t kWarmBuffers = 4;

static_assert(sizeof(fuse_in_header) + sizeof(fuse_write_in) == kRequestHeader);
static_assert(sizeof(fuse_in_header) + sizeof(fuse_read_in) == kRequestHeader);
static_assert(sizeof(fuse_out_header) == kReplyHeader);

template <typename T>
T load(const std::byte* from) noexcept {
  T out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

// SAFETY: the kernel hands back what OPEN's reply gave it, and releases after the last request.
File& file_of(uint64_t handle) noexcept { return *reinterpret_cast<File*>(handle); }

}  // namespace

Channel::Channel(base::EventLoop& loop, base::UniqueFd device, Session& session)
    : loop_(loop), device_(std::move(device)), session_(session) {}

Channel::~Channel() = default;

bool Channel::serve() {
  unsigned reads = 0;
  while (!stopping_.cancelled()) {
    if (!has_room()) {
      wait_for_room();
      continue;
    }
    RequestBuffer* buffer = nullptr;
    try {
      buffer = buffers_.take();
    } catch (const base::Error& e) {
      // There are other buffers, all in use: go on when a request has ended.
      base::log_warning("{}", e.what());
      wait_for_room();
      continue;
    }
    size_t length = 0;
    const Got got = receive(*buffer, length);
    if (got == Got::kRequest) {
      dispatch(*buffer, length);
      if (++reads % kReadsPerTurn == 0) loop_.yield();
      continue;
    }
    buffers_.give_back(buffer);
    if (got == Got::kUnmounted) return !stopping_.cancelled();
    if (!wait_for_request()) break;
  }
  return false;
}

Channel::Got Channel::receive(RequestBuffer& buffer, size_t& length) noexcept {
  for (;;) {
    const std::span<std::byte> room = buffer.request();
    const ssize_t n = ::read(device_.get(), room.data(), room.size());
    if (n >= 0) {
      length = static_cast<size_t>(n);
      return Got::kRequest;
    }
    switch (errno) {
      case EINTR:
      case ENOENT:  // the sender gave up at that moment
        continue;
      case EAGAIN:
        return Got::kNothing;
      case ENODEV:        // unmounted
      case ECONNABORTED:  // aborted
        return Got::kUnmounted;
      default:
        base::log_error("/dev/fuse: reading a request: {}", base::errno_text(errno));
        return Got::kUnmounted;
    }
  }
}

bool Channel::wait_for_request() {
  if (in_flight_ == 0) buffers_.trim(kWarmBuffers);
  const int64_t ready = base::io::poll(device_.get(), POLLIN, &stopping_);
  return ready >= 0 || ready == -EINTR;
}

void Channel::wake(base::Fiber*& waiting) noexcept {
  if (waiting == nullptr) return;
  base::Fiber* const fiber = std::exchange(waiting, nullptr);
  fiber->loop().wake(*fiber);
}

void Channel::wait_for_room() {
  base::Fiber* const self = base::Fiber::current();
  reader_waiting_ = self;
  self->waiting_for = "requests in flight";
  self->suspend();
}

void Channel::wait_until_idle() {
  while (in_flight_ > 0) {
    base::Fiber* const self = base::Fiber::current();
    idle_waiting_ = self;
    self->waiting_for = "requests in flight";
    self->suspend();
  }
}

void Channel::stop_reading() noexcept {
  stopping_.cancel();
  wake(reader_waiting_);
}

bool Channel::has_room() const noexcept {
  return in_flight_ < kMaxInFlight && bytes_in_flight_ < kMaxBytesInFlight;
}

void Channel::begin(Running& request) noexcept {
  request.next = running_;
  if (running_ != nullptr) running_->prev = &request;
  running_ = &request;
  ++in_flight_;
  bytes_in_flight_ += request.activity.data;
  counters_.in_flight.store(in_flight_, std::memory_order_relaxed);
}

void Channel::end(Running& request) noexcept {
  if (request.prev != nullptr) {
    request.prev->next = request.next;
  } else {
    running_ = request.next;
  }
  if (request.next != nullptr) request.next->prev = request.prev;
  --in_flight_;
  bytes_in_flight_ -= request.activity.data;
  counters_.in_flight.store(in_flight_, std::memory_order_relaxed);
  if (has_room()) wake(reader_waiting_);
  if (in_flight_ == 0) wake(idle_waiting_);
}

void Channel::dispatch(RequestBuffer& buffer, size_t length) {
  const std::byte* const request = buffer.request().data();
  counters_.requests.store(counters_.requests.load(std::memory_order_relaxed) + 1,
                           std::memory_order_relaxed);
  if (length < sizeof(fuse_in_header)) {
    base::log_error("/dev/fuse: a request of {} bytes is no request", length);
    buffers_.give_back(&buffer);
    return;
  }
  const auto header = load<fuse_in_header>(request);
  if (header.opcode == FUSE_READ && length >= kRequestHeader) {
    start_read(buffer);
  } else if (header.opcode == FUSE_WRITE && length >= kRequestHeader) {
    start_write(buffer, length - kRequestHeader);
  } else if (header.opcode == FUSE_INTERRUPT) {
    // Every request ends by itself. Told so, the kernel stops sending these.
    reply(header.unique, ENOSYS, nullptr, 0);
    buffers_.give_back(&buffer);
  } else {
    pass_to_libfuse(buffer, length, header.opcode, header.unique);
  }
}

void Channel::pass_to_libfuse(RequestBuffer& buffer, size_t length, uint32_t opcode,
                              uint64_t unique) {
  processing_opcode_ = opcode;
  processing_unique_ = unique;
  session_.process(buffer.request().first(length));
  processing_opcode_ = 0;
  processing_unique_ = 0;
  buffers_.give_back(&buffer);
}

void Channel::start_read(RequestBuffer& buffer) {
  const std::byte* const request = buffer.request().data();
  const auto unique = load<fuse_in_header>(request).unique;
  const auto in = load<fuse_read_in>(request + sizeof(fuse_in_header));
  const Activity activity{"read", &file_of(in.fh), in.offset, in.size, in.size};
  if (in.size > kMaxTransfer) {
    reply(unique, EINVAL, nullptr, 0);
    buffers_.give_back(&buffer);
    return;
  }
  // A direct read says whose it is; one that fills the page cache, for a mapping, is nobody's.
  const bool to_cache = (in.read_flags & FUSE_READ_LOCKOWNER) == 0;
  try {
    spawn(activity, [this, &buffer, activity, unique, to_cache] {
      run_read(buffer, activity, unique, to_cache);
    });
  } catch (...) {
    reply(unique, reply_errno(std::current_exception()), nullptr, 0);
    buffers_.give_back(&buffer);
  }
}

void Channel::run_read(RequestBuffer& buffer, const Activity& activity, uint64_t unique,
                       bool to_cache) {
  try {
    if (to_cache) [[unlikely]] {
      activity.file->keep_cache_true(session_.invalidator());
    }
    const size_t n = activity.file->read(activity.offset, {buffer.data(), activity.length});
    // In one piece with its header, which lies right before the data.
    const fuse_out_header header{static_cast<uint32_t>(kReplyHeader + n), 0, unique};
    std::memcpy(buffer.reply_header(), &header, sizeof header);
    const iovec whole{buffer.reply_header(), header.len};
    (void)send(&whole, 1);
  } catch (...) {
    activity.file->count_error();
    reply(unique, reply_errno(std::current_exception()), nullptr, 0);
  }
  buffers_.give_back(&buffer);
}

void Channel::start_write(RequestBuffer& buffer, size_t length) {
  const std::byte* const request = buffer.request().data();
  const auto unique = load<fuse_in_header>(request).unique;
  const auto in = load<fuse_write_in>(request + sizeof(fuse_in_header));
  const Activity activity{"write", &file_of(in.fh), in.offset, in.size, in.size};
  if (in.size != length) {
    reply(unique, EINVAL, nullptr, 0);
    buffers_.give_back(&buffer);
    return;
  }
  const bool durable = (in.flags & (O_DSYNC | O_SYNC)) != 0;
  try {
    spawn(activity, [this, &buffer, activity, unique, durable] {
      run_write(buffer, activity, unique, durable);
    });
  } catch (...) {
    reply(unique, reply_errno(std::current_exception()), nullptr, 0);
    buffers_.give_back(&buffer);
  }
}

void Channel::run_write(RequestBuffer& buffer, const Activity& activity, uint64_t unique,
                        bool durable) {
  try {
    const size_t n =
        activity.file->write(activity.offset, {buffer.data(), activity.length}, durable);
    const fuse_write_out out{static_cast<uint32_t>(n), 0};
    reply(unique, 0, &out, sizeof out);
  } catch (...) {
    activity.file->count_error();
    reply(unique, reply_errno(std::current_exception()), nullptr, 0);
  }
  buffers_.give_back(&buffer);
}

void Channel::reply(uint64_t unique, int error, const void* body, size_t length) noexcept {
  fuse_out_header header{static_cast<uint32_t>(sizeof header + length), -error, unique};
  const iovec iov[] = {{&header, sizeof header}, {const_cast<void*>(body), length}};
  (void)send(iov, length > 0 ? 2 : 1);
}

int Channel::send(const iovec* iov, int count) noexcept {
  if (!device_) return ENODEV;
  const ssize_t n = count == 1 ? ::write(device_.get(), iov->iov_base, iov->iov_len)
                               : ::writev(device_.get(), iov, count);
  if (n >= 0) return 0;
  const int error = errno;
  // ENOENT: nobody waits for this answer any more. ENODEV: the mount is gone.
  if (error != ENOENT && error != ENODEV) {
    static base::RateLimit limit;
    uint64_t suppressed = 0;
    if (limit.allow(&suppressed)) {
      base::log_error("/dev/fuse: a reply was refused: {} ({} more like it)",
                      base::errno_text(error), suppressed);
    }
  }
  return error;
}

std::vector<std::string> Channel::describe_requests(size_t limit) const {
  std::vector<std::string> out;
  for (const Running* r = running_; r != nullptr && out.size() < limit; r = r->next) {
    out.push_back(fmt::format("'{}': {} of {} bytes at {} is in flight", r->activity.file->name(),
                              r->activity.what, r->activity.length, r->activity.offset));
  }
  return out;
}

}  // namespace minivmm::fuse
