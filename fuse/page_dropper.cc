// SPDX-License-Identifier: Apache-2.0
#include "fuse/page_dropper.h"

#include <linux/close_range.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>

#include "base/io_threads.h"

namespace minivmm::fuse {
namespace {

// System calls are made by number below, because sanitizers take a descriptor for the same file in
// every thread.

// Gives the calling thread a table with nothing in it but `device`. False: this kernel cannot (it
// is older than 5.9), and the table is the process's still.
bool leave_descriptors(int device) noexcept {
  const auto number = static_cast<unsigned>(device);
  return number > 0 && ::syscall(SYS_close_range, 0U, number - 1, CLOSE_RANGE_UNSHARE) == 0 &&
         ::syscall(SYS_close_range, number + 1, ~0U, 0U) == 0;
}

int tell_kernel(int device, uint64_t inode, uint64_t offset, uint64_t length) noexcept {
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  fuse_notify_inval_inode_out what{};
  what.ino = inode;
  what.off = static_cast<int64_t>(std::min(offset, kMost));
  what.len = static_cast<int64_t>(std::min(length, kMost - std::min(offset, kMost)));
  fuse_out_header header{};
  header.len = sizeof header + sizeof what;
  header.error = FUSE_NOTIFY_INVAL_INODE;
  const iovec iov[] = {{&header, sizeof header}, {&what, sizeof what}};
  if (::syscall(SYS_writev, device, iov, 2) >= 0) return 0;
  // It knows no such inode, or the mount is gone: there are no such pages.
  return errno == ENOENT || errno == ENODEV || errno == ENOTCONN ? 0 : errno;
}

}  // namespace

PageDropper::PageDropper(base::UniqueFd device) {
  thread_ = std::thread([this, fd = device.get()] { run(fd); });
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return state_ != State::kStarting; });
  // The thread closes the one that it uses: in its own table a second one.
  if (!own_table_) (void)device.release();
}

PageDropper::~PageDropper() {
  {
    const std::lock_guard lock(mutex_);
    state_ = State::kEnding;
    changed_.notify_all();
  }
  thread_.join();
}

int PageDropper::drop(uint64_t inode, uint64_t offset, uint64_t length) noexcept {
  std::unique_lock lock(mutex_);
  inode_ = inode;
  offset_ = offset;
  length_ = length;
  state_ = State::kAsked;
  changed_.notify_all();
  changed_.wait(lock, [this] { return state_ == State::kIdle; });
  return error_;
}

void PageDropper::run(int device) noexcept {
  ::pthread_setname_np(::pthread_self(), "fuse-drop-pages");
  const bool own_table = leave_descriptors(device);
  base::confine_io_thread(base::IoThread::kPages, "fuse-drop-pages");
  std::unique_lock lock(mutex_);
  own_table_ = own_table;
  for (;;) {
    state_ = State::kIdle;
    changed_.notify_all();
    changed_.wait(lock, [this] { return state_ != State::kIdle; });
    if (state_ == State::kEnding) break;
    lock.unlock();
    const int error = tell_kernel(device, inode_, offset_, length_);
    lock.lock();
    error_ = error;
  }
  (void)::syscall(SYS_close, device);
}

}  // namespace minivmm::fuse
