// SPDX-License-Identifier: Apache-2.0
// Replies of one client on their way out. They gather until flush(), which sends as many as the
// socket takes in one call; what it does not take is sent by a fiber that waits for room. The
// connection's loop only.
//
// A client that does not read while others wait for memory has its replies shed: they give up
// their memory, and are made again one by one when the socket has room. So it can neither hold the
// memory nor need be cut off.
//
// Replies made of what a node lends (block/graph/loan.h) are sent at once or not at all: what the
// socket does not take is given back, and borrowed or read again when it has room.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>

#include "base/event_loop.h"
#include "nbd-server/local_wait.h"
#include "nbd-server/request.h"
#include "nbd-server/resources.h"
#include "nbd-server/stream.h"

namespace minivmm::nbd {

class ReplyQueue {
 public:
  // Given each request whose reply has been sent, or will never be.
  class Owner {
   public:
    virtual void on_sent(Request& request) noexcept = 0;
    // Asked when nothing could be sent for about a second, with how long that is by now. True:
    // give the client up.
    virtual bool on_stall(std::chrono::nanoseconds stalled) noexcept = 0;
    // Others wait for memory.
    virtual bool memory_is_wanted() const noexcept = 0;
    // Gives up what a queued request holds, of whose reply a part is out if it has `begun`. False:
    // it cannot be without it.
    virtual bool on_shed(Request& request, bool begun) noexcept = 0;
    // Makes it whole again if that needs neither memory nor waiting.
    virtual bool on_borrow(Request& request) noexcept = 0;
    // Fiber: makes it whole again, and no longer `shed` once it holds anything. A reply that had
    // not begun may be another one then. False: the client cannot be served further.
    virtual bool on_restore(Request& request, bool begun) noexcept = 0;

   protected:
    ~Owner() = default;
  };

  ReplyQueue(base::EventLoop& loop, Stream& stream, Resources& resources, Owner& owner)
      : loop_(loop), stream_(stream), resources_(resources), owner_(owner) {}
  ReplyQueue(const ReplyQueue&) = delete;
  ReplyQueue& operator=(const ReplyQueue&) = delete;

  // Takes over a request whose reply is complete. Nothing is sent yet.
  void push(Request& request) noexcept;
  // Sends what has gathered, without waiting.
  void flush() noexcept;
  // flush() at the end of this turn of the loop, so that requests that end in one turn go out
  // together.
  void flush_soon() noexcept;

  size_t gathered() const noexcept { return count_; }
  size_t gathered_bytes() const noexcept { return bytes_; }
  // The socket has no room: the client does not read as fast as it asks.
  bool blocked() const noexcept { return sending_; }
  // Replies wait without their memory: until they are out, there shall be no further ones.
  bool sheds() const noexcept { return shed_ > 0; }
  // The client is gone or was given up: replies are dropped.
  bool broken() const noexcept { return broken_; }
  // Fiber: waits until nothing is queued and none of the queue's fibers runs.
  void wait_empty() noexcept;

 private:
  // A client that reads on after it was found not to gets longer, up to half a second: what it
  // asked for is read from the node again each time.
  static constexpr std::chrono::nanoseconds kPatience = std::chrono::milliseconds(100);
  static constexpr std::chrono::nanoseconds kMostPatience = std::chrono::milliseconds(500);

  // How much of what is borrowed again goes out in one call.
  static constexpr size_t kRefill = 256 << 10;

  enum class Sent { kAll, kBlocked, kBare };  // kBare: the first reply has to get its data again
  Sent send_some() noexcept;
  size_t gather() noexcept;
  void advance(size_t sent) noexcept;
  void drop_all() noexcept;
  void send_rest() noexcept;
  bool wait_for_room(bool& room) noexcept;
  bool end_loans(bool for_good) noexcept;
  bool shed(Request& request) noexcept;
  void shed_all() noexcept;
  bool refill() noexcept;
  bool restore_front() noexcept;
  void pop_front() noexcept;
  void after() noexcept;

  base::EventLoop& loop_;
  Stream& stream_;
  Resources& resources_;
  Owner& owner_;

  Request* head_ = nullptr;
  Request* tail_ = nullptr;
  size_t count_ = 0;       // queued
  size_t bytes_ = 0;       // of these
  size_t front_sent_ = 0;  // bytes of head_ that are out
  size_t shed_ = 0;        // of those queued
  uint64_t sent_ = 0;      // bytes, in all
  // See wait_for_room.
  base::Clock::time_point progress_{};
  uint64_t sent_then_ = 0;
  std::chrono::nanoseconds patience_ = kPatience;
  bool sending_ = false;  // a fiber waits for room: only it sends
  bool flush_posted_ = false;
  bool broken_ = false;
  LocalWait empty_;
};

}  // namespace minivmm::nbd
