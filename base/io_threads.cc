// SPDX-License-Identifier: Apache-2.0
#include "base/io_threads.h"

#include <linux/fs.h>
#include <sys/syscall.h>

#include <atomic>

#include "base/call_filter.h"
#include "base/log.h"
#include "base/pool.h"

namespace minivmm::base {
namespace {

std::atomic<bool> g_wanted{false};
thread_local bool t_confined = false;

// BLKDISCARD and its kind.
constexpr uint8_t kBlockRequests = 0x12;

CallFilter filter_for(IoThread kind) {
  CallFilter out;
  switch (kind) {
    case IoThread::kWork:
      // TLS handshakes.
      out.allow({SYS_recvfrom, SYS_recvmsg, SYS_sendto, SYS_sendmsg});
      break;
    case IoThread::kPages:
      out.allow({SYS_close});
      break;
    case IoThread::kLoop:
    case IoThread::kPool:
      // What a request takes comes first: old kernels ask one by one.
      out.allow({SYS_io_uring_enter, SYS_preadv2, SYS_pwritev2, SYS_recvmsg, SYS_sendmsg,
                 SYS_recvfrom, SYS_sendto, SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_ctl,
                 SYS_preadv, SYS_pwritev, SYS_pread64, SYS_pwrite64, SYS_fsync, SYS_fdatasync,
                 SYS_fallocate, SYS_ftruncate, SYS_lseek, SYS_fadvise64, SYS_copy_file_range,
                 SYS_sync_file_range, SYS_getrusage, SYS_io_uring_register, SYS_close, SYS_fcntl,
                 SYS_flock, SYS_fstat, SYS_newfstatat, SYS_statx, SYS_accept4, SYS_shutdown,
                 SYS_getsockopt, SYS_setsockopt, SYS_getsockname, SYS_getpeername,
                 // The FUSE threads that a loop makes leave the process's descriptors so, and
                 // then have a filter of their own.
                 SYS_close_range, SYS_seccomp});
      out.allow_requests(kBlockRequests).allow_threads();
      break;
  }
  return out;
}

}  // namespace

void confine_io_threads() {
  // Now, by a thread that has no filter that they could inherit.
  Pool::errands().start_threads();
  g_wanted.store(true, std::memory_order_release);
}

bool io_threads_are_confined() noexcept { return g_wanted.load(std::memory_order_acquire); }

void confine_io_thread(IoThread kind, const std::string& name) noexcept {
  if (!io_threads_are_confined()) return;
  t_confined = true;
  try {
    filter_for(kind).apply(name);
  } catch (const std::exception& error) {
    log_warning("{}: runs without a filter of system calls: {}", name, error.what());
  }
}

bool this_io_thread_is_confined() noexcept { return t_confined; }

}  // namespace minivmm::base
