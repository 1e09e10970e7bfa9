// SPDX-License-Identifier: Apache-2.0
#include "cli/image_arguments.h"

#include <cerrno>
#include <sstream>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/options.h"
#include "cli/command.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using Strings = std::vector<std::string>;

po::typed_value<Strings>* text_option(const char* name) {
  return po::value<Strings>()->composing()->value_name(name);
}

// Not bool_switch, which may be given only once.
po::typed_value<bool>* flag_option() {
  return po::value<bool>()->zero_tokens()->implicit_value(true)->default_value(false);
}

void add_common_options(po::options_description& options, std::string_view what) {
  auto add = options.add_options();
  for (const char letter : what) {
    switch (letter) {
      case 'f':
        add("format,f", text_option("FORMAT"),
            "the image's format, qcow2 or raw; guessed from its first bytes otherwise");
        break;
      case 'o':
        add("output", text_option("human|json"),
            "what the output is for: people (the default) or programs");
        break;
      case 'q':
        add("quiet,q", flag_option(), "print nothing but errors");
        break;
      case 'p':
        add("progress,p", flag_option(), "show how far it is, in percent");
        break;
      case 't':
        add("cache,t", text_option("CACHE"),
            "how the image is written: none and directsync with O_DIRECT, writeback, writethrough "
            "and unsafe (no flush) through the page cache");
        break;
      case 'T':
        add("source-cache,T", text_option("CACHE"), "how images are read, as -t");
        break;
      case 'i':
        add("image-opts", flag_option(),
            "images are named by options (driver=qcow2,file.filename=...) and not by a path");
        break;
      default:
        add("force-share,U", flag_option(),
            "read the image although somebody may be writing to it");
    }
  }
  add("object", text_option("TYPE,id=ID,..."), "refused: no image command opens encrypted images");
  add("help,h", flag_option(), "this text");
}

namespace {

// What --help does not show: the positional names.
po::options_description hidden_options() {
  po::options_description out;
  out.add_options()("name", po::value<Strings>());
  return out;
}

// In getopt's words, which qemu-img's users know.
[[noreturn]] void refuse_syntax(const po::error& error, const Strings& arguments) {
  if (const auto* unknown = dynamic_cast<const po::unknown_option*>(&error)) {
    throw UsageError{fmt::format("unrecognized option '{}'", unknown->get_option_name())};
  }
  if (const auto* wrong = dynamic_cast<const po::invalid_command_line_syntax*>(&error);
      wrong != nullptr && wrong->kind() == po::invalid_syntax::missing_parameter) {
    // Only the last one can lack it, and it is named as it was written.
    throw UsageError{fmt::format("missing argument for option '{}'", arguments.back())};
  }
  throw UsageError{error.what()};
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
    if (is_set(values, "help")) {
      std::ostringstream text;
      text << syntax.usage << syntax.options;
      fmt::print("{}", text.str());
      return false;
    }
    po::notify(values);
  } catch (const po::error& e) {
    refuse_syntax(e, arguments);
  }
  if (values.count("object") != 0) {
    throw UsageError{"--object: no image command opens encrypted images; serve and boot do"};
  }
  return true;
}

bool is_set(const po::variables_map& values, const char* name) {
  return values.count(name) != 0 && values[name].as<bool>();
}

Strings text_values(const po::variables_map& values, const char* name) {
  return values.count(name) != 0 ? values[name].as<Strings>() : Strings();
}

std::string text_value(const po::variables_map& values, const char* name) {
  const Strings all = text_values(values, name);
  return all.empty() ? std::string() : all.back();
}

Strings given_names(const po::variables_map& values) { return text_values(values, "name"); }

std::string one_file_name(const po::variables_map& values) {
  const Strings names = given_names(values);
  if (names.size() != 1) throw UsageError{"Expecting one image file name"};
  return names.front();
}

OutputFormat output_format(const po::variables_map& values) {
  const std::string text = text_value(values, "output");
  if (text.empty() || text == "human") return OutputFormat::kHuman;
  if (text == "json") return OutputFormat::kJson;
  throw base::Error(EINVAL, "--output must be used with human or json as argument.");
}

uint64_t parse_size_as(const std::string& text, const char* what, uint64_t most) {
  uint64_t size = 0;
  bool too_large = false;
  try {
    size = block::parse_size(text, what);
  } catch (const base::Error&) {
    // Only digits: a number, but one that fits nothing.
    too_large = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
    if (!too_large) {
      // Two lines, each with the program's name, as qemu-img prints them.
      const std::string prefix =
          personality().drop_in ? fmt::format("{}: ", personality().program) : std::string();
      throw base::Error(EINVAL,
                        fmt::format("Invalid {} specified. You may use k, M, G, T, P or E suffixes "
                                    "for\n{}kilobytes, megabytes, gigabytes, terabytes, petabytes "
                                    "and exabytes.",
                                    what, prefix));
    }
  }
  if (too_large || size > most) {
    throw base::Error(EINVAL,
                      fmt::format("Invalid {} specified. Must be between 0 and {}.", what, most));
  }
  return size;
}

std::optional<uint64_t> size_value(const po::variables_map& values, const char* name,
                                   const char* what, uint64_t most) {
  if (values.count(name) == 0) return std::nullopt;
  return parse_size_as(text_value(values, name), what, most);
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
