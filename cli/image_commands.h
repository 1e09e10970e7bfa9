// SPDX-License-Identifier: Apache-2.0
// The subcommands of `minivmm image`. As the commands of command.h: the arguments after the name
// in, the exit status out.
#pragma once

#include <string>

#include <vector>

namespace minivmm::cli {

int run_image_create(const std::vector<std::string>& arguments);
int run_image_info(const std::vector<std::string>& arguments);
int run_image_check(const std::vector<std::string>& arguments);

}  // namespace minivmm::cli
