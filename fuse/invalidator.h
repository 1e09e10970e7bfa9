// SPDX-License-Identifier: Apache-2.0
// Drops pages from the kernel's cache. Files are opened with direct I/O, so only those that are
// mapped have any; for them a change by another user of the disk has to be told.
//
// The kernel drops a page only once a READ of it that is under way has been answered, so telling
// it blocks (PageDropper): it is done by a thread of its own, on a descriptor of its own, never by
// a loop (which may be the one to answer) nor by a pool (which the answer may need).
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/sync.h"
#include "base/unique_fd.h"

namespace minivmm::fuse {

class Invalidator {
 public:
  // The thread starts with the first use.
  explicit Invalidator(base::UniqueFd device);
  Invalidator(const Invalidator&) = delete;
  Invalidator& operator=(const Invalidator&) = delete;
  // The thread may still wait for the kernel; it then goes on alone and frees what is left.
  ~Invalidator();

  // Fiber. On return no page of the range is cached that was read before the call.
  void invalidate(uint64_t inode, uint64_t offset, uint64_t length) noexcept;

  // Fiber. Nothing is invalidated from now on; closes the device. False: the thread still waits for
  // the kernel at the deadline.
  bool stop(base::Clock::time_point deadline);

 private:
  struct Job;
  struct Shared;
  static void run(const std::shared_ptr<Shared>& shared) noexcept;

  const std::shared_ptr<Shared> shared_;
};

}  // namespace minivmm::fuse
