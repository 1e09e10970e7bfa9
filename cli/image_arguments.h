// SPDX-License-Identifier: Apache-2.0
// What the image subcommands share on the command line: qemu-img's conventions, and texts of their
// own for --help. As with getopt, an option that is given again replaces what was there.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include <boost/program_options.hpp>

namespace minivmm::cli {

enum class OutputFormat { kHuman, kJson };

struct ImageSyntax {
  std::string usage;  // printed before the options by --help
  boost::program_options::options_description options{"Options", 100, 60};
  // The last argument is never an option, whatever it begins with ("-10G").
  bool last_is_name = false;
};

struct ImageOption {
  const char* names;  // "format,f"
  const char* value;  // what --help calls its value; nullptr: it has none
  const char* help;
};

// A subcommand's syntax: its own options, and those that several have, by letters: s (the
// sandbox's), f, o (--output), q, U, p, t, T, i (--image-opts), and always --object and --help.
ImageSyntax image_syntax(const char* usage, std::initializer_list<ImageOption> own,
                         std::string_view common);
void add_options(boost::program_options::options_description& options,
                 std::initializer_list<ImageOption> more);

// The long names of the options that were given, in their order, are the value of this one.
inline constexpr const char* kGivenOptions = "options in their order";

// Parses; prints usage and options and returns false for --help. What --object says is there
// afterwards. Throws UsageError.
bool parse_image_arguments(const std::vector<std::string>& arguments, const ImageSyntax& syntax,
                           boost::program_options::variables_map& values);

bool is_set(const boost::program_options::variables_map& values, const char* name);
// The last one that was given; empty if none was.
std::string text_value(const boost::program_options::variables_map& values, const char* name);
std::vector<std::string> text_values(const boost::program_options::variables_map& values,
                                     const char* name);
// The arguments that are not options.
std::vector<std::string> given_names(const boost::program_options::variables_map& values);
// The value of an option that may not have been given.
std::optional<std::string> optional_text(const boost::program_options::variables_map& values,
                                         const char* name);
// The one file that most subcommands take. Throws UsageError.
std::string one_file_name(const boost::program_options::variables_map& values);
// Throws UsageError.
OutputFormat output_format(const boost::program_options::variables_map& values);

// A size ("64k") from 0 to `most` under an option, or nothing. What is wrong is said as qemu-img
// does of `what` ("rate limit").
std::optional<uint64_t> size_value(const boost::program_options::variables_map& values,
                                   const char* name, const char* what, uint64_t most = INT64_MAX);
uint64_t parse_size_as(const std::string& text, const char* what, uint64_t most = INT64_MAX);

// For text on a terminal: what an image says of itself may hold control characters, which could
// pass for other lines of the output or command the terminal. They become \xNN.
std::string printable(const std::string& text);

}  // namespace minivmm::cli
