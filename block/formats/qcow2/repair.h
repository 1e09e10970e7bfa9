// SPDX-License-Identifier: Apache-2.0
// Mends an image's metadata, as `qemu-img check -r` does. Works on the file of an image that is not
// open otherwise.
//
// kLeaks lowers refcounts that are too high, and sets COPIED flags right where nothing else is
// wrong. kAll first gives every entry
// a meaning (reserved bits, places outside the file or on top of other metadata, contradictory
// subcluster bits; bitmaps that make no sense are dropped), then sets the refcounts right, in place
// or by a new refcount table at the end of the file, then the COPIED flags. An image without
// corruption is no longer marked as dirty or corrupt afterwards.
//
// Wherever it is cut short the image is no worse than before, and a further repair completes it:
// a version 3 image is marked dirty meanwhile; refcounts go up before flags say that they are 1,
// and down at the end; a new refcount table is durable before the header points to it.
#pragma once

#include <cstdint>

#include "block/formats/qcow2/check.h"
#include "block/graph/edge.h"

namespace minivmm::block::qcow2 {

enum class Repair : uint8_t { kLeaks, kAll };

struct RepairResult {
  CheckResult found;
  CheckResult left;  // of a second check; the same as `found` if nothing was changed
  uint64_t leaks_fixed = 0;
  uint64_t corruptions_fixed = 0;
};

// The edge may write and resize. What is found, changed, and left is reported line by line. Where
// tables cannot be read nothing is changed (the result has check_errors). Throws what check_image
// throws, EFBIG if the refcounts do not fit a table, and errors of writing. Fiber.
RepairResult repair_image(Edge& file, Repair what, const CheckReport& report);

// Gives a (version 3) image refcounts of another width, 2^order bits: a new structure behind
// everything else, then the header that names it. Throws EINVAL where the image is corrupt, or a
// count does not fit. Durable on return; cut short, the image is as it was, with leaks. Fiber.
void change_refcount_width(Edge& file, unsigned order);

}  // namespace minivmm::block::qcow2
