// SPDX-License-Identifier: Apache-2.0
// One I/O operation in flight: what io_uring calls a submission, in terms that the epoll backend
// understands too. It lives on the stack of the fiber that waits for it, and so do the buffers: a
// fiber with an operation in flight is never destroyed and always waits for its completion.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstdint>

namespace minivmm::base {

class Fiber;

enum class IoOpcode : uint8_t {
  kReadv,      // fd, iov, iov_count, offset (kNoOffset: the file position or a stream)
  kWritev,     // fd, iov, iov_count, offset, flags (RWF_*)
  kFsync,      // fd; flags 1 = data only
  kFallocate,  // fd, mode in flags, offset, length
  kPoll,       // fd, events in flags; result is revents
};

inline constexpr uint64_t kNoOffset = ~uint64_t{0};

struct IoOp {
  IoOpcode opcode;
  int fd = -1;
  uint32_t flags = 0;
  uint32_t iov_count = 0;
  const iovec* iov = nullptr;
  uint64_t offset = 0;
  uint64_t length = 0;

  // Set by the backend: bytes or a value >= 0, or -errno.
  int64_t result = 0;
  // Whom to wake. Set by EventLoop::run_io; nullptr when the operation has completed.
  Fiber* fiber = nullptr;

  // Backend's own.
  IoOp* next = nullptr;
  IoOp* prev = nullptr;
  bool cancelled = false;
  bool parked = false;
};

}  // namespace minivmm::base
