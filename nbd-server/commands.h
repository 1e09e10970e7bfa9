// SPDX-License-Identifier: Apache-2.0
// Runs requests that were found valid and puts their replies together. On the request's fiber;
// everything it waits for is the node. Replies are complete when these return: an error is a reply
// too.
#pragma once

#include <string_view>

#include <exception>

#include "nbd-server/negotiation.h"
#include "nbd-server/request.h"
#include "nbd-server/resources.h"

namespace minivmm::nbd {

// At most so many requests are merged into one.
inline constexpr size_t kMaxGroup = 64;

class Commands {
 public:
  Commands(const Agreement& agreed, Resources& resources) noexcept
      : agreed_(agreed), resources_(resources) {}

  // Answers a READ with the bytes where the node has them in memory: nothing is copied here. Does
  // not wait. False: it has to be run.
  bool borrow(Request& request) noexcept;

  // One request, or a group of READs or WRITEs that follow each other without a gap, linked by
  // `next`: those reach the node as one. Returns how many failed.
  unsigned run(Request& first) noexcept;

  // The most that a BLOCK_STATUS may need for its reply.
  uint64_t room_for_status(const wire::Request& head) const noexcept;

  // Leaves of a complete reply what cannot be had again. `begun`: a part of it is out, so that the
  // rest has to fit. False: then it needs all that it has.
  bool shed(Request& request, bool begun) noexcept;
  // Makes the reply whole again, with what the node has by now: who has not got his answer may get
  // either. It may become an error reply: false if it has `begun`, which nothing mends.
  bool restore(Request& request, bool begun) noexcept;

  // An error reply. `reason` is for the client's user; only structured replies carry it.
  void fail(Request& request, wire::ErrorCode error, std::string_view reason) noexcept;

 private:
  void run_group(Request& first);
  bool run_one(Request& request) noexcept;
  void dispatch(Request& request);
  void read(Request& request);
  bool read_with_holes(Request& request);
  void block_status(Request& request);
  void fail(Request& request, const std::exception_ptr& error) noexcept;
  bool asks_for_holes(const Request& request) const noexcept;
  void reply_data(Request& request, const std::byte* data) noexcept;
  void reply_done(Request& request) noexcept;
  wire::Answered answered(const Request& request) const noexcept {
    return {request.head.cookie, request.head.offset, agreed_.extended()};
  }
  block::Handle& node() const noexcept { return agreed_.target->handle(); }

  const Agreement& agreed_;
  Resources& resources_;
};

}  // namespace minivmm::nbd
