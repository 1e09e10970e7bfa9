// SPDX-License-Identifier: Apache-2.0
// Has the kernel drop cached pages, and waits for it.
//
// The kernel drops a page only once a READ of it that is under way has been answered, and that wait
// cannot be interrupted, not even by SIGKILL: a process that is killed in that moment does not end
// before the mount is aborted (`umount -f`). So that nothing else is
// held up until then, the wait is done by a thread with a descriptor table of its own and nothing
// else in it: the images' locks and the sockets go at once.
//
// Owned and used by one thread, which blocks.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "base/unique_fd.h"

namespace minivmm::fuse {

class PageDropper {
 public:
  // `device` is a descriptor of the mount. Throws std::system_error where no thread can be made.
  explicit PageDropper(base::UniqueFd device);
  PageDropper(const PageDropper&) = delete;
  PageDropper& operator=(const PageDropper&) = delete;
  // Closes the device.
  ~PageDropper();

  // No page of the range is cached on return that was read before the call. 0 or an errno.
  int drop(uint64_t inode, uint64_t offset, uint64_t length) noexcept;

 private:
  enum class State { kStarting, kIdle, kAsked, kEnding };
  void run(int device) noexcept;

  std::mutex mutex_;
  std::condition_variable changed_;
  State state_ = State::kStarting;  // the rest: written by the owner while kIdle
  bool own_table_ = false;
  uint64_t inode_ = 0;
  uint64_t offset_ = 0;
  uint64_t length_ = 0;
  int error_ = 0;
  std::thread thread_;
};

}  // namespace minivmm::fuse
