// SPDX-License-Identifier: Apache-2.0
// `snapshot=on`: a disk whose writes go to an overlay that nobody sees and that is gone at the end,
// however that comes.
#pragma once

#include "block/graph/graph.h"
#include "control/config.h"

namespace minivmm::control {

// Opens the disk's image read-only as NAME.base, and a qcow2 overlay on it under the disk's name,
// in a file without a name in $TMPDIR (or /var/tmp). Throws base::Error. Fiber.
void add_snapshot(block::Graph& graph, const Disk& disk);

}  // namespace minivmm::control
