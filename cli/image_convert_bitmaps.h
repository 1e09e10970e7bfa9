// SPDX-License-Identifier: Apache-2.0
// The dirty bitmaps of an image that is converted, in qemu-img's words.
#pragma once

#include "cli/image_open.h"

namespace minivmm::cli {

// Before anything is made. Throws where the source has no bitmaps, or one that is inconsistent and
// is not to be skipped. Fiber.
void check_source_bitmaps(OpenImage& source, bool skip_broken);
// Throws ENOTSUP where the target cannot hold any.
void require_bitmaps(block::Edge& target);
// Gives the target, which has the same disk, the source's bitmaps. Fiber.
void copy_bitmaps(OpenImage& source, block::Edge& target);

}  // namespace minivmm::cli
