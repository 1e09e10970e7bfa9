// SPDX-License-Identifier: Apache-2.0
#include "cli/image_arguments.h"

#include <sstream>

#include <fmt/core.h>

#include "cli/command.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using Strings = std::vector<std::string>;

void add_common_options(po::options_description& options, const std::string& what) {
  auto add = options.add_options();
  for (const char letter : what) {
    switch (letter) {
      case 'f':
        add("format,f", po::value<std::string>()->value_name("FORMAT"),
            "the image's format, qcow2 or raw; guessed from its first bytes otherwise");
        break;
      case 'o':
        add("output", po::value<std::string>()->value_name("human|json"),
            "what the output is for: people (the default) or programs");
        break;
      case 'q':
        add("quiet,q", po::bool_switch(), "print nothing but errors");
        break;
      default:
        add("force-share,U", po::bool_switch(),
            "read the image although somebody may be writing to it");
    }
  }
  add("help,h", "this text");
}

namespace {

// What --help does not show: the positional names, and what qemu-img has and we do not, because
// saying so beats "unrecognised".
po::options_description hidden_options() {
  po::options_description out;
  // clang-format off
  out.add_options()
    ("name", po::value<Strings>())
    ("object", po::value<Strings>()->composing())
    ("image-opts", po::bool_switch());
  // clang-format on
  return out;
}

void refuse(const po::variables_map& values) {
  if (values.count("object") != 0) {
    throw UsageError{"--object is not supported: there are no encrypted images yet"};
  }
  if (is_set(values, "image-opts")) {
    throw UsageError{"--image-opts is not supported: name the image by its path"};
  }
}

}  // namespace

bool parse_image_arguments(const Strings& arguments, const ImageSyntax& syntax,
                           po::variables_map& values) {
  po::options_description all;
  all.add(syntax.options).add(hidden_options());
  try {
    // No guessing of abbreviated options: a script must mean what it says.
    const int style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
    po::command_line_parser parser(arguments);
    const auto names = po::positional_options_description().add("name", -1);
    po::store(parser.options(all).positional(names).style(style).run(), values);
    if (values.count("help") != 0) {
      std::ostringstream text;
      text << syntax.usage << syntax.options;
      fmt::print("{}", text.str());
      return false;
    }
    po::notify(values);
  } catch (const po::error& e) {
    throw UsageError{e.what()};
  }
  refuse(values);
  return true;
}

bool is_set(const po::variables_map& values, const char* name) {
  return values.count(name) != 0 && values[name].as<bool>();
}

std::string text_value(const po::variables_map& values, const char* name) {
  return values.count(name) != 0 ? values[name].as<std::string>() : std::string();
}

Strings given_names(const po::variables_map& values) {
  return values.count("name") != 0 ? values["name"].as<Strings>() : Strings();
}

std::string one_file_name(const po::variables_map& values) {
  const Strings names = given_names(values);
  if (names.size() != 1) throw UsageError{"Expecting one image file name"};
  return names.front();
}

OutputFormat output_format(const po::variables_map& values) {
  const std::string text = text_value(values, "output");
  if (text.empty() || text == "human") return OutputFormat::kHuman;
  if (text == "json") return OutputFormat::kJson;
  throw UsageError{"--output must be used with human or json as argument."};
}

std::string printable(const std::string& text) {
  std::string out;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out.push_back(c);
    }
  }
  return out;
}

}  // namespace minivmm::cli
