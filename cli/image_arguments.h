// SPDX-License-Identifier: Apache-2.0
// What the image subcommands share on the command line: qemu-img's conventions, and texts of their
// own for --help.
#pragma once

#include <string>

#include <vector>

#include <boost/program_options.hpp>

namespace minivmm::cli {

enum class OutputFormat { kHuman, kJson };

struct ImageSyntax {
  std::string usage;  // printed before the options by --help
  boost::program_options::options_description options;
};

// The options that every image subcommand has: -f, --output, -q, -U, --help. `what` are letters
// out of "foqU".
void add_common_options(boost::program_options::options_description& options,
                        const std::string& what);

// Parses; prints usage and options and returns false for --help. Throws UsageError, also for
// options of qemu-img that are not supported here, by name.
bool parse_image_arguments(const std::vector<std::string>& arguments, const ImageSyntax& syntax,
                           boost::program_options::variables_map& values);

bool is_set(const boost::program_options::variables_map& values, const char* name);
std::string text_value(const boost::program_options::variables_map& values, const char* name);
// The arguments that are not options.
std::vector<std::string> given_names(const boost::program_options::variables_map& values);
// The one file that info and check take. Throws UsageError.
std::string one_file_name(const boost::program_options::variables_map& values);
// Throws UsageError.
OutputFormat output_format(const boost::program_options::variables_map& values);

// For text on a terminal: what an image says of itself may hold control characters, which could
// pass for other lines of the output or command the terminal. They become \xNN.
std::string printable(const std::string& text);

}  // namespace minivmm::cli
