// SPDX-License-Identifier: Apache-2.0
// Whether an image's data clusters may be holes of its file: then who asks what a range holds is
// told what the file says.
#pragma once

#include "block/formats/qcow2/image_file.h"

namespace minivmm::block::qcow2 {

// True if clearly more clusters have a refcount than the file has blocks for, as where metadata was
// preallocated and the data is still to come. (QEMU's measure.) Reads refcounts only where the file
// is so sparse that it can be true, and not more of them than the file is long. False where that
// cannot be found out. Fiber.
bool counts_more_than_stored(ImageFile& image);

}  // namespace minivmm::block::qcow2
