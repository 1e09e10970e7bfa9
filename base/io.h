// SPDX-License-Identifier: Apache-2.0
// I/O for fibers: straight-line calls that suspend the fiber. On the current loop.
//
// Results are the kernel's: bytes or a value, or -errno; nothing here throws. Short reads and
// writes are the caller's to continue unless the name says "all".
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "base/cancel.h"
#include "base/iovec.h"
#include "base/timer_queue.h"

namespace minivmm::base::io {

// Whole ranges of a file. read_at stops early only at the end of the file. Either returns the
// number of bytes done or -errno. EINTR and short transfers are continued; more than IOV_MAX
// buffers are cut up.
int64_t read_at(int fd, IoSpan to, uint64_t offset) noexcept;
int64_t write_at(int fd, IoSpan from, uint64_t offset) noexcept;
// EINTR is continued: it is no verdict on what was written.
int64_t fsync(int fd, bool data_only) noexcept;
int64_t fallocate(int fd, int mode, uint64_t offset, uint64_t length) noexcept;

// Waits until the descriptor is ready for one of `events` (POLLIN, ...); returns revents.
int64_t poll(int fd, uint32_t events, CancelSource* cancel = nullptr) noexcept;
// Waits for and takes the counter of an eventfd; -ECANCELED if cancelled.
int64_t read_eventfd(int fd, CancelSource* cancel = nullptr) noexcept;

// Returns false if cancelled before the time was up.
bool sleep_until(Clock::time_point deadline, CancelSource* cancel = nullptr);
bool sleep_for(std::chrono::nanoseconds time, CancelSource* cancel = nullptr);

}  // namespace minivmm::base::io
