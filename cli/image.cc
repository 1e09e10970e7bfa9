// SPDX-License-Identifier: Apache-2.0
// minivmm image: finds the subcommand.
#include <string_view>

#include <cstdio>

#include <fmt/core.h>

#include "cli/command.h"
#include "cli/image_commands.h"
#include "cli/image_personality.h"

namespace minivmm::cli {
namespace {

constexpr ImageCommand kImageCommands[] = {
    {"amend", "change how an image is stored: passwords, format options", &image_amend_syntax,
     &run_image_amend},
    {"bench", "time requests to an image", &image_bench_syntax, &run_image_bench},
    {"bitmap", "change a dirty bitmap of an image", &image_bitmap_syntax, &run_image_bitmap},
    {"check", "check the consistency of an image's metadata", &image_check_syntax,
     &run_image_check},
    {"commit", "move what an overlay holds into its backing file", &image_commit_syntax,
     &run_image_commit},
    {"compare", "whether two images have the same content", &image_compare_syntax,
     &run_image_compare},
    {"convert", "copy images into a new one, in any format", &image_convert_syntax,
     &run_image_convert},
    {"create", "make a disk image", &image_create_syntax, &run_image_create},
    {"dd", "copy a part of an image", &image_dd_syntax, &run_image_dd},
    {"info", "what an image file says of itself", &image_info_syntax, &run_image_info},
    {"map", "what of an image is stored where", &image_map_syntax, &run_image_map},
    {"measure", "how large the file of a new image will be", &image_measure_syntax,
     &run_image_measure},
    {"rebase", "give an overlay another backing file", &image_rebase_syntax, &run_image_rebase},
    {"resize", "make an image larger or smaller", &image_resize_syntax, &run_image_resize},
    {"snapshot", "snapshots inside an image: list, make, go back to, delete",
     &image_snapshot_syntax, &run_image_snapshot},
};

void print_help(std::FILE* to) {
  const bool drop_in = personality().drop_in;
  const char* name = drop_in ? "qemu-img" : "minivmm image";
  if (drop_in) fmt::print(to, "qemu-img version 7.2.0 (minivmm {})\n", MINIVMM_VERSION);
  fmt::print(to,
             "Works on disk images with qemu-img's arguments, output and exit statuses.\n\n"
             "{}: {} COMMAND [options]\n\nCommands:\n",
             drop_in ? "usage" : "Usage", name);
  for (const ImageCommand& command : kImageCommands) {
    fmt::print(to, "  {:<8} {}\n", command.name, command.summary);
  }
  fmt::print(to,
             "\n`{0} COMMAND --help` teaches each one.\n\nExamples:\n"
             "  {0} create -f qcow2 disk.qcow2 20G\n"
             "  {0} info --output=json disk.qcow2\n"
             "  {0} convert -p -O qcow2 disk.img disk.qcow2\n"
             "  {0} check disk.qcow2\n\nSupported formats: luks qcow2 raw\n",
             name);
}

}  // namespace

std::span<const ImageCommand> image_commands() { return kImageCommands; }

std::optional<int> run_from_table(std::span<const ImageCommand> table,
                                  const std::vector<std::string>& arguments) {
  for (const ImageCommand& command : table) {
    if (command.name != arguments[0]) continue;
    boost::program_options::variables_map values;
    const std::vector<std::string> rest(arguments.begin() + 1, arguments.end());
    return parse_image_arguments(rest, command.syntax(), values) ? command.run(values) : 0;
  }
  return std::nullopt;
}

int run_image(const std::vector<std::string>& arguments) {
  const bool drop_in = personality().drop_in;
  if (arguments.empty()) {
    if (drop_in) throw UsageError{"Not enough arguments"};
    print_help(stderr);
    return 1;
  }
  const std::string& first = arguments[0];
  if (first == "--help" || first == "-h" || first == "help") {
    print_help(stdout);
    return 0;
  }
  if (drop_in && (first == "--version" || first == "-V")) {
    fmt::print("qemu-img version 7.2.0 (minivmm {})\n", MINIVMM_VERSION);
    return 0;
  }
  if (drop_in && (first == "-T" || first == "--trace") && arguments.size() > 2) {
    // There are no trace events here; scripts that name some go on, as with a QEMU without them.
    return run_image({arguments.begin() + 2, arguments.end()});
  }
  if (drop_in && first.starts_with('-')) {
    throw UsageError{fmt::format("unrecognized option '{}'", first)};
  }
  if (const auto status = run_from_table(kImageCommands, arguments)) return *status;
  throw UsageError{drop_in ? fmt::format("Command not found: {}", first)
                           : fmt::format("unknown command 'image {}'", first)};
}

}  // namespace minivmm::cli
