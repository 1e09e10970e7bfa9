// SPDX-License-Identifier: Apache-2.0
// Says from outside whether a disk holds what a stress job of the probe guest may have left: every
// request that was made durable is there, and nothing is there that no request wrote.
#pragma once

#include <string>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "images/probe/stress_plan.h"

namespace minivmm::test {

struct StressCheck {
  probe::StressParameters parameters;
  uint32_t writer = 1;
  uint64_t first = 1;    // sequence number the job began with
  uint64_t durable = 0;  // requests up to here were flushed ("probe: flushed sequence=N")
  uint64_t issued = 0;   // requests up to here may have reached the disk; >= durable
  // The blocks held this job's or no data before; else what was never written is not looked at.
  bool started_empty = false;
  // After a power loss a block may be part old, part new, by sectors.
  bool may_tear = false;
};

// Fills the span from the disk at the byte offset.
using ReadDisk = std::function<void(uint64_t offset, std::span<std::byte> out)>;

// The first few things that are wrong, a line each; empty if nothing is.
std::vector<std::string> check_stress(const StressCheck& check, const ReadDisk& read);

// Reads from a raw image file. Throws std::runtime_error.
ReadDisk read_file(const std::string& path);

}  // namespace minivmm::test
