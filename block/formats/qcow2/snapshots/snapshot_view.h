// SPDX-License-Identifier: Apache-2.0
// A snapshot in the place of the disk, for reading it without going back to it.
#pragma once

#include <string>

#include <optional>

#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/tables.h"
#include "block/graph/edge.h"

namespace minivmm::block::qcow2 {

// How a user names a snapshot. With `either`: by the id that is this, or else by the name.
struct SnapshotName {
  std::optional<std::string> either = {};
  std::optional<std::string> id = {};
  std::optional<std::string> name = {};
};

// The image's header with the snapshot's L1 table and size, and without what belongs to the disk.
// Only for reading. Throws ENOENT, and EINVAL for a snapshot that makes no sense. Fiber.
Header header_of_snapshot(Edge& file, const Header& header, const SnapshotName& name);

}  // namespace minivmm::block::qcow2
