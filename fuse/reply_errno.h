// SPDX-License-Identifier: Apache-2.0
// Which errno a FUSE request may be answered with.
#pragma once

#include <exception>

namespace minivmm::fuse {

// A positive errno for a reply. Numbers that the kernel would take for something else become EIO:
// ENOSYS (it stops sending that kind of request and, for FSYNC, reports success from then on),
// EAGAIN and EINTR (callers of regular files do not expect them), and what is out of its range
// (it would reject the reply and the caller would wait for ever).
int reply_errno(int err) noexcept;
// The same of what was thrown.
int reply_errno(const std::exception_ptr& error) noexcept;

}  // namespace minivmm::fuse
