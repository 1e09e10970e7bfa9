// SPDX-License-Identifier: Apache-2.0
// Finds the kernel that a guest's disk carries, by a child process without rights (bootdisk/): what
// is on the disk may be hostile, and the library that reads its file system was not made for that.
#pragma once

#include <string>

#include <cstdint>
#include <optional>
#include <vector>

#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "block/graph/graph.h"

namespace minivmm::control {

struct DiskKernel {
  base::UniqueFd kernel;  // memory files, from their start
  base::UniqueFd initrd;  // may be closed: there is none
  std::string arguments;
  std::string origin;              // "partition 1: /boot/grub/grub.cfg"
  std::string title;               // of the entry; may be empty
  std::vector<std::string> notes;  // for the user
};

// Nullopt: there is no partition table and no ext file system, or no kernel in it. `limit` bounds
// the kernel and the initrds, bytes each. A thread that may wait, not a loop's. Throws base::Error:
// reading failed, the child died or took too long, a file is damaged or too large.
std::optional<DiskKernel> find_disk_kernel(base::EventLoop& loop, block::Graph& graph,
                                           const std::string& node_name, uint64_t limit);

}  // namespace minivmm::control
