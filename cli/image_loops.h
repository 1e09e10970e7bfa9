// SPDX-License-Identifier: Apache-2.0
// How many loops a job of the image tool runs on.
#pragma once

#include <algorithm>
#include <thread>

namespace minivmm::cli {

// One a core; more than a few only wait for the memory and the disk.
inline unsigned job_loops() { return std::clamp(std::thread::hardware_concurrency(), 1U, 8U); }

}  // namespace minivmm::cli
