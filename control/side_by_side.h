// SPDX-License-Identifier: Apache-2.0
// Several pieces of work that may each wait for a device, at once on plain threads.
#pragma once

#include <functional>
#include <vector>

namespace minivmm::control {

// Runs all of them and returns when the last has ended: one that hangs takes none of the others'
// time. They must not throw. Where no thread can be made, one runs on the caller's.
void run_side_by_side(const std::vector<std::function<void()>>& works);

}  // namespace minivmm::control
