// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"

#include <cerrno>
#include <new>

#include <gtest/gtest.h>

namespace minivmm::base {
namespace {

TEST(Error, ContextIsPrependedOutermostFirst) {
  Error error(ENOENT, "backing file 'base.raw' not found");
  error.prepend("overlay.qcow2").prepend("disk0");
  EXPECT_STREQ(error.what(), "disk0: overlay.qcow2: backing file 'base.raw' not found");
  EXPECT_EQ(error.err(), ENOENT);
  EXPECT_EQ(error.code(), std::errc::no_such_file_or_directory);
}

TEST(Error, ErrnoZeroIsAnIoError) { EXPECT_EQ(Error(0, "x").err(), EIO); }

TEST(Error, ForeignExceptionsTranslate) {
  EXPECT_EQ(errno_of(std::make_exception_ptr(Error(ENOSPC, "full"))), ENOSPC);
  EXPECT_EQ(errno_of(std::make_exception_ptr(std::bad_alloc())), ENOMEM);
  EXPECT_EQ(errno_of(std::make_exception_ptr(42)), EIO);
}

}  // namespace
}  // namespace minivmm::base
