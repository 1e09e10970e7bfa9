// SPDX-License-Identifier: Apache-2.0
// libfuse's callbacks: what each request means. They get the Session as user data.
#pragma once

#define FUSE_USE_VERSION 314
#include <fuse3/fuse_lowlevel.h>

namespace minivmm::fuse {

fuse_lowlevel_ops make_operations() noexcept;

}  // namespace minivmm::fuse
