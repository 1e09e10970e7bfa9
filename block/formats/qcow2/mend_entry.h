// SPDX-License-Identifier: Apache-2.0
// What a repair makes of an L2 entry that makes no sense. Pure. As much as possible of what it says
// is kept: bits that must not be set are cleared, and only where nothing tells where the data was
// do zeroes take its place. (In version 2, which has no zeroes: nothing, so a backing file shows.)
#pragma once

#include <cstdint>

#include "block/formats/qcow2/l2_entry.h"

namespace minivmm::block::qcow2 {

// The same entry where it is sound, else one that is.
RawL2 mend_l2(RawL2 raw, const Geometry& geometry, uint64_t guest_offset) noexcept;

// The entry without its host cluster or compressed data.
RawL2 without_host(RawL2 raw, const Geometry& geometry) noexcept;

}  // namespace minivmm::block::qcow2
