// SPDX-License-Identifier: Apache-2.0
// Which of the host's processors a thread may run on.
#pragma once

#include <string>

#include <vector>

namespace minivmm::vmm {

// Throws base::Error(EINVAL) that names the processor that does not exist or may not be used.
void check_processors(const std::vector<unsigned>& processors);

// Binds the calling thread, named for the log. Where the system refuses that (a processor was taken
// away meanwhile) it says so and goes on. Empty: no effect.
void run_on_processors(const std::vector<unsigned>& processors, const std::string& thread) noexcept;

}  // namespace minivmm::vmm
