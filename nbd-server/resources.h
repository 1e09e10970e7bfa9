// SPDX-License-Identifier: Apache-2.0
// What the connections of one loop share: buffers, request objects and scratch space, so that a
// request costs no allocation and an idle connection holds none. The loop's thread only.
#pragma once

#include <sys/uio.h>

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "base/event_loop.h"
#include "nbd-server/buffer_pool.h"
#include "nbd-server/request.h"

namespace minivmm::nbd {

class Session;

class Resources {
 public:
  explicit Resources(KeptBuffers& kept) noexcept : buffers_(kept) {}
  Resources(const Resources&) = delete;
  Resources& operator=(const Resources&) = delete;
  ~Resources();

  BufferPool& buffers() noexcept { return buffers_; }

  // A blank request. Throws std::bad_alloc.
  Request& take_request();
  // Gives back the request and its buffer.
  void give_back(Request& request) noexcept;

  // True if the session that received last was `session`; from now on it is.
  bool served_before(const Session& session) noexcept {
    return std::exchange(last_served_, &session) == &session;
  }

  // When a session last left this loop because it had too much to do; others see first whether
  // that was enough.
  base::Clock::time_point left() const noexcept { return left_; }
  void leave(base::Clock::time_point now) noexcept { left_ = now; }

  // For one system call that does not wait.
  static constexpr size_t kIovecs = 1024;  // the kernel's bound for one call
  std::array<iovec, kIovecs>& iovecs() noexcept { return iovecs_; }

 private:
  static constexpr size_t kMaxKept = 1024;

  BufferPool buffers_;
  Request* free_ = nullptr;
  size_t kept_ = 0;
  const Session* last_served_ = nullptr;  // compared, never followed
  base::Clock::time_point left_{};
  std::array<iovec, kIovecs> iovecs_;
};

// By the index of the loop; those of the server's loops are there.
using ResourcesOfLoops = std::array<std::unique_ptr<Resources>, base::EventLoop::kMaxLoops>;

}  // namespace minivmm::nbd
