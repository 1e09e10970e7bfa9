// SPDX-License-Identifier: Apache-2.0
// Walks what an L1 table refers to, as the file has it: L2 tables, and the clusters of the guest.
// Each reference counts once in the refcount of its cluster.
//
// Time and memory: each L2 table is read once, one cluster at a time; no two entries of an L1 table
// may refer to the same one.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/l2_entry.h"

namespace minivmm::block::qcow2 {

using L1Entries = std::vector<uint64_t>;  // host order

// Reads an L1 table. Throws EINVAL for one that is not in the file or too long.
L1Entries read_l1(ImageFile& image, uint64_t offset, uint64_t entries);

// Calls visit(clusters, is_table) for each reference; a table comes before what it refers to.
// Throws EINVAL, in the middle, for what makes no sense.
using VisitReference = std::function<void(HostClusters clusters, bool is_table)>;
void walk_tree(ImageFile& image, const L1Entries& l1, const VisitReference& visit);

}  // namespace minivmm::block::qcow2
