// SPDX-License-Identifier: Apache-2.0
// Checks an image's metadata against itself, as `qemu-img check` does: every reference to every
// cluster is counted and compared with the refcounts. Reads only.
//
// Memory: the L1 table, some 32 bytes for each L2 table, about a byte for each cluster referred to,
// and one cluster. Time: each metadata table is read once (those of the active disk twice), however
// many snapshots use it; what a damaged image refers to more often than it may is reported and not
// followed again.
#pragma once

#include <string>

#include <cstdint>
#include <functional>

#include "block/graph/edge.h"

namespace minivmm::block::qcow2 {

// qemu-img's terms.
struct CheckResult {
  uint64_t corruptions = 0;
  uint64_t leaks = 0;
  uint64_t check_errors = 0;  // parts that could not be read
  uint64_t image_end_offset = 0;
  uint64_t total_clusters = 0;  // of the guest's disk
  uint64_t allocated_clusters = 0;
  uint64_t fragmented_clusters = 0;
  uint64_t compressed_clusters = 0;
};

// A line for each finding, in qemu-img's words; after the first few thousand they are only counted.
using CheckReport = std::function<void(const std::string& line)>;

// Throws what reading the header throws (then there is nothing to check) and ENOTSUP for features
// that this driver does not know. Fiber.
CheckResult check_image(Edge& file, const CheckReport& report);

}  // namespace minivmm::block::qcow2
