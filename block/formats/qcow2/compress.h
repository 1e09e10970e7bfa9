// SPDX-License-Identifier: Apache-2.0
// One plain cluster to compressed bytes, as QEMU writes and reads them. Pure; deep stacks and long
// work: call in a pool.
#pragma once

#include <cstddef>
#include <span>

#include "block/formats/qcow2/layout.h"

namespace minivmm::block::qcow2 {

// Returns how many bytes of `out` were filled; 0: they do not fit, the cluster is to be stored as
// it is. Throws std::bad_alloc.
size_t compress(Compression kind, std::span<const std::byte> in, std::span<std::byte> out);

}  // namespace minivmm::block::qcow2
