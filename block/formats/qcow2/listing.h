// SPDX-License-Identifier: Apache-2.0
// Reads the lists of what an image keeps beside its disk: internal snapshots and bitmaps. For
// tools that show them; nothing that an entry points to is read.
//
// Memory: what the image's tables take, at most kMaxListBytes each.
#pragma once

#include <vector>

#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/tables.h"
#include "block/graph/edge.h"

namespace minivmm::block::qcow2 {

// What QEMU accepts of either table.
inline constexpr uint64_t kMaxListBytes = 64ULL << 20;

// Throw EINVAL naming the entry that is wrong. Fiber.
std::vector<SnapshotEntry> read_snapshots(Edge& file, const Header& header);
// Those that are up to date: none where the autoclear bit of the bitmaps is not set.
std::vector<BitmapEntry> read_bitmaps(Edge& file, const Header& header);

}  // namespace minivmm::block::qcow2
