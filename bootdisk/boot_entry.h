// SPDX-License-Identifier: Apache-2.0
// One system that a boot loader's configuration offers.
#pragma once

#include <string>

#include <vector>

namespace minivmm::bootdisk {

struct BootEntry {
  std::string title;
  std::string kernel;                // a path, as the configuration has it
  std::vector<std::string> initrds;  // to be joined in this order
  std::string arguments;             // the kernel's command line
};

}  // namespace minivmm::bootdisk
