// SPDX-License-Identifier: Apache-2.0
#include "fuse/reply_errno.h"

#include <cerrno>
#include <new>
#include <stdexcept>

#include <gtest/gtest.h>

#include "base/error.h"

namespace minivmm::fuse {
namespace {

TEST(ReplyErrno, PassesOnWhatCallersUnderstand) {
  for (const int err :
       {EIO, ENOSPC, EROFS, EPERM, ENXIO, EOPNOTSUPP, ENOMEM, EDQUOT, ENODEV, 511}) {
    EXPECT_EQ(reply_errno(err), err);
  }
}

// The kernel takes ENOSYS for "never ask again": an fsync would succeed from then on without a
// flush.
TEST(ReplyErrno, NeverSaysNotImplemented) { EXPECT_EQ(reply_errno(ENOSYS), EIO); }

TEST(ReplyErrno, NeverAsksFileUsersToTryAgain) {
  EXPECT_EQ(reply_errno(EAGAIN), EIO);
  EXPECT_EQ(reply_errno(EINTR), EIO);
}

// The kernel refuses a reply with such a number, and the caller would wait for ever.
TEST(ReplyErrno, StaysInTheKernelsRange) {
  for (const int err : {0, -1, -5, 512, 100000}) EXPECT_EQ(reply_errno(err), EIO) << err;
}

TEST(ReplyErrno, TranslatesExceptions) {
  EXPECT_EQ(reply_errno(std::make_exception_ptr(base::Error(ENOSPC, "full"))), ENOSPC);
  EXPECT_EQ(reply_errno(std::make_exception_ptr(base::Error(ENOSYS, "x"))), EIO);
  EXPECT_EQ(reply_errno(std::make_exception_ptr(std::bad_alloc())), ENOMEM);
  EXPECT_EQ(reply_errno(std::make_exception_ptr(std::runtime_error("x"))), EIO);
}

}  // namespace
}  // namespace minivmm::fuse
