// SPDX-License-Identifier: Apache-2.0
// The subcommands of `minivmm image`, in a table: the name, what it does, its options and its
// function. The table is what help, manual pages and shell completion are made from.
#pragma once

#include <string>
#include <string_view>

#include <optional>
#include <span>
#include <vector>

#include "cli/image_arguments.h"

namespace minivmm::cli {

struct ImageCommand {
  std::string_view name;
  std::string_view summary;
  ImageSyntax (*syntax)();
  // The options as given in, the exit status out; throws as Command::run.
  int (*run)(const boost::program_options::variables_map& values);
};

std::span<const ImageCommand> image_commands();

// Runs the command of the table that the first argument names, with the rest; nothing where the
// table has none of that name.
std::optional<int> run_from_table(std::span<const ImageCommand> table,
                                  const std::vector<std::string>& arguments);

// One pair a file image_NAME.cc.
ImageSyntax image_amend_syntax();
int run_image_amend(const boost::program_options::variables_map& values);
ImageSyntax image_bench_syntax();
int run_image_bench(const boost::program_options::variables_map& values);
ImageSyntax image_bitmap_syntax();
int run_image_bitmap(const boost::program_options::variables_map& values);
ImageSyntax image_check_syntax();
int run_image_check(const boost::program_options::variables_map& values);
ImageSyntax image_commit_syntax();
int run_image_commit(const boost::program_options::variables_map& values);
ImageSyntax image_compare_syntax();
int run_image_compare(const boost::program_options::variables_map& values);
ImageSyntax image_convert_syntax();
int run_image_convert(const boost::program_options::variables_map& values);
ImageSyntax image_create_syntax();
int run_image_create(const boost::program_options::variables_map& values);
ImageSyntax image_dd_syntax();
int run_image_dd(const boost::program_options::variables_map& values);
ImageSyntax image_info_syntax();
int run_image_info(const boost::program_options::variables_map& values);
ImageSyntax image_map_syntax();
int run_image_map(const boost::program_options::variables_map& values);
ImageSyntax image_measure_syntax();
int run_image_measure(const boost::program_options::variables_map& values);
ImageSyntax image_rebase_syntax();
int run_image_rebase(const boost::program_options::variables_map& values);
ImageSyntax image_resize_syntax();
int run_image_resize(const boost::program_options::variables_map& values);
ImageSyntax image_snapshot_syntax();
int run_image_snapshot(const boost::program_options::variables_map& values);

}  // namespace minivmm::cli
