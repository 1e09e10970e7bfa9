// SPDX-License-Identifier: Apache-2.0
// Making a new LUKS image in a file.
#pragma once

#include <cstdint>

#include "block/crypto/luks1_create.h"
#include "block/graph/edge.h"
#include "block/graph/options.h"

namespace minivmm::block::luks {

struct CreateOptions {
  uint64_t size = 0;  // of the disk, bytes; rounded up to 512
  crypto::Luks1CreateOptions crypto;
};

// Takes qemu-img's -o options: size, and those of take_luks1_create_options. Throws EINVAL,
// ENOTSUP.
CreateOptions take_create_options(Options& options);

// Makes the file hold an encrypted disk; what it held is lost. A device keeps its size and must be
// large enough. The edge may write and resize. Durable on return. After an error the file holds no
// image. What the disk reads as is undefined: a hole decrypts to noise. Fiber; takes iter-time and
// more.
void create_image(Edge& file, const CreateOptions& options);

}  // namespace minivmm::block::luks
