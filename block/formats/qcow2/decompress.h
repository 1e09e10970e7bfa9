// SPDX-License-Identifier: Apache-2.0
// One compressed cluster to plain bytes. Pure; deep stacks and long work: call in a pool.
#pragma once

#include <cstddef>
#include <span>

#include "block/formats/qcow2/layout.h"

namespace minivmm::block::qcow2 {

// Fills `out` (a cluster) from the start of `in`, which may end with unrelated bytes. Never makes
// more than `out` holds. Returns nullptr, or what is wrong with the data. Throws std::bad_alloc.
const char* decompress(Compression kind, std::span<const std::byte> in, std::span<std::byte> out);

}  // namespace minivmm::block::qcow2
