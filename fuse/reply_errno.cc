// SPDX-License-Identifier: Apache-2.0
#include "fuse/reply_errno.h"

#include <cerrno>

#include "base/error.h"

namespace minivmm::fuse {

int reply_errno(int err) noexcept {
  constexpr int kFirstRefused = 512;  // the kernel's own codes (ERESTARTSYS) start here
  if (err <= 0 || err >= kFirstRefused) return EIO;
  switch (err) {
    case ENOSYS:
    case EAGAIN:
    case EINTR:
      return EIO;
    default:
      return err;
  }
}

int reply_errno(const std::exception_ptr& error) noexcept {
  return reply_errno(base::errno_of(error));
}

}  // namespace minivmm::fuse
