// SPDX-License-Identifier: Apache-2.0
// A subcommand of `minivmm`. One file each.
#pragma once

#include <string>
#include <string_view>

#include <span>
#include <vector>

namespace minivmm::cli {

struct Command {
  std::string_view name;
  std::string_view summary;
  // The arguments after the subcommand's name. Returns the exit status; throws base::Error for
  // what went wrong and UsageError for what was called wrongly.
  int (*run)(const std::vector<std::string>& arguments);
};

// A wrong call: the message is followed by where to find help. Exit status 1, as of qemu-img.
struct UsageError {
  std::string message;
};

int run_boot(const std::vector<std::string>& arguments);
int run_serve(const std::vector<std::string>& arguments);
int run_image(const std::vector<std::string>& arguments);
int run_nbd(const std::vector<std::string>& arguments);
int run_control(const std::vector<std::string>& arguments);
// Not a subcommand: the program called as qemu-nbd.
int run_qemu_nbd(const std::vector<std::string>& arguments);
int run_check_host(const std::vector<std::string>& arguments);
// Not for users: the child of `boot` (bootdisk/channel.h).
int run_find_kernel();

std::span<const Command> commands();

}  // namespace minivmm::cli
