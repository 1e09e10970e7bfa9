// SPDX-License-Identifier: Apache-2.0
// minivmm image: finds the subcommand.
#include <string_view>

#include <cstdio>

#include <fmt/core.h>

#include "cli/command.h"
#include "cli/image_commands.h"

namespace minivmm::cli {
namespace {

constexpr Command kImageCommands[] = {
    {"create", "make a disk image", &run_image_create},
    {"info", "what an image file says of itself", &run_image_info},
    {"check", "check the consistency of an image's metadata", &run_image_check},
};

constexpr std::string_view kElsewhere[] = {
    "amend", "bench", "bitmap",  "commit", "compare", "convert",
    "dd",    "map",   "measure", "rebase", "resize",  "snapshot",
};

void print_help(std::FILE* to) {
  fmt::print(to,
             "Works on disk images with qemu-img's arguments, output and exit statuses.\n\n"
             "Usage: minivmm image COMMAND [options]\n\nCommands:\n");
  for (const Command& command : kImageCommands) {
    fmt::print(to, "  {:<8} {}\n", command.name, command.summary);
  }
  fmt::print(to,
             "\n`minivmm image COMMAND --help` teaches each one.\n\nExamples:\n"
             "  minivmm image create -f qcow2 disk.qcow2 20G\n"
             "  minivmm image info --output=json disk.qcow2\n"
             "  minivmm image check disk.qcow2\n");
}

}  // namespace

int run_image(const std::vector<std::string>& arguments) {
  if (arguments.empty()) {
    print_help(stderr);
    return 1;
  }
  const std::string& first = arguments[0];
  if (first == "--help" || first == "-h" || first == "help") {
    print_help(stdout);
    return 0;
  }
  for (const Command& command : kImageCommands) {
    if (command.name == first) return command.run({arguments.begin() + 1, arguments.end()});
  }
  for (const std::string_view name : kElsewhere) {
    if (name != first) continue;
    throw UsageError{fmt::format("image {0} is not supported; `qemu-img {0}` is", name)};
  }
  throw UsageError{fmt::format("unknown command 'image {}'", first)};
}

}  // namespace minivmm::cli
