// SPDX-License-Identifier: Apache-2.0
// One loop's share of a mount: a descriptor of the device, the fiber that reads requests from it,
// and the requests in flight. Everything but the counters happens on the loop's thread.
//
// READ and WRITE are decoded and answered here; the rest goes through libfuse (Session). A request
// starts at once, on a fiber of its own, and mostly ends there and then.
#pragma once

#include <string>
#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "base/cancel.h"
#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "fuse/file.h"
#include "fuse/request_buffer.h"

namespace minivmm::fuse {

class Session;

// What a request does, for messages.
struct Activity {
  const char* what = nullptr;
  File* file = nullptr;
  uint64_t offset = 0;
  uint64_t length = 0;
  uint64_t data = 0;  // bytes of it that lie in our memory
};

class Channel {
 public:
  Channel(base::EventLoop& loop, base::UniqueFd device, Session& session);
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;
  ~Channel();

  base::EventLoop& loop() const noexcept { return loop_; }

  // Fiber. Reads and starts requests until stop_reading(); true if the mount is gone by somebody
  // else's doing. Requests may be in flight when it returns.
  bool serve();
  void stop_reading() noexcept;
  // Fiber. Returns when no request is in flight.
  void wait_until_idle();
  // Closes the device: requests in flight get no answer any more. The kernel fails what was not
  // answered when the last descriptor of the mount is closed.
  void close_device() noexcept { device_.reset(); }

  // What is in flight, a line each.
  std::vector<std::string> describe_requests(size_t limit) const;

  // Any thread.
  struct Counters {
    std::atomic<uint64_t> requests{0};
    std::atomic<uint64_t> in_flight{0};
  };
  const Counters& counters() const noexcept { return counters_; }

  // For Session. 0 or an errno of the device's.
  int send(const iovec* iov, int count) noexcept;
  uint64_t processing_unique() const noexcept { return processing_unique_; }
  uint32_t processing_opcode() const noexcept { return processing_opcode_; }
  // Starts `body` as a fiber that counts as a request in flight. Throws what making it throws.
  template <typename Body>
  void spawn(const Activity& activity, Body&& body);

 private:
  class Running;
  enum class Got { kRequest, kNothing, kUnmounted };

  Got receive(RequestBuffer& buffer, size_t& length) noexcept;
  bool wait_for_request();
  void wait_for_room();
  void dispatch(RequestBuffer& buffer, size_t length);
  void pass_to_libfuse(RequestBuffer& buffer, size_t length, uint32_t opcode, uint64_t unique);
  void start_read(RequestBuffer& buffer);
  void start_write(RequestBuffer& buffer, size_t length);
  void run_read(RequestBuffer& buffer, const Activity& activity, uint64_t unique, bool to_cache);
  void run_write(RequestBuffer& buffer, const Activity& activity, uint64_t unique, bool durable);
  void reply(uint64_t unique, int error, const void* body, size_t length) noexcept;
  bool has_room() const noexcept;
  void begin(Running& request) noexcept;
  void end(Running& request) noexcept;
  static void wake(base::Fiber*& waiting) noexcept;

  base::EventLoop& loop_;
  base::UniqueFd device_;
  Session& session_;
  base::CancelSource stopping_;
  BufferPool buffers_;
  Counters counters_;

  Running* running_ = nullptr;  // a list
  uint64_t in_flight_ = 0;
  uint64_t bytes_in_flight_ = 0;
  base::Fiber* reader_waiting_ = nullptr;  // for room
  base::Fiber* idle_waiting_ = nullptr;    // for in_flight_ == 0

  // The request that libfuse is looking at.
  uint64_t processing_unique_ = 0;
  uint32_t processing_opcode_ = 0;
};

// A request in flight; on its fiber's stack.
class Channel::Running {
 public:
  Running(Channel& channel, const Activity& what) noexcept : activity(what), channel_(channel) {
    channel_.begin(*this);
  }
  ~Running() { channel_.end(*this); }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

  const Activity activity;
  Running* prev = nullptr;
  Running* next = nullptr;

 private:
  Channel& channel_;
};

template <typename Body>
void Channel::spawn(const Activity& activity, Body&& body) {
  loop_.spawn_now("FUSE request", [this, activity, run = std::forward<Body>(body)]() mutable {
    const Running running(*this, activity);
    run();
  });
}

}  // namespace minivmm::fuse
