// SPDX-License-Identifier: Apache-2.0
#include "cli/image_arguments.h"

#include <cerrno>
#include <sstream>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/gnutls.h"
#include "block/crypto/object.h"
#include "block/graph/options.h"
#include "cli/command.h"
#include "cli/image_personality.h"
#include "cli/image_sandbox.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using Strings = std::vector<std::string>;

void add_options(po::options_description& options, std::initializer_list<ImageOption> more) {
  for (const ImageOption& option : more) {
    // Not bool_switch, which may be given only once.
    const po::value_semantic* value =
        option.value != nullptr
            ? static_cast<const po::value_semantic*>(
                  po::value<Strings>()->composing()->value_name(option.value))
            : po::value<bool>()->zero_tokens()->implicit_value(true)->default_value(false);
    options.add_options()(option.names, value, option.help);
  }
}

namespace {

struct CommonOption {
  char letter;
  ImageOption option;
};

constexpr CommonOption kCommonOptions[] = {
    {'f',
     {"format,f", "FORMAT",
      "the image's format: qcow2, raw or luks; guessed from its first bytes otherwise"}},
    {'o', {"output", "human|json", "what the output is for: people (the default) or programs"}},
    {'q', {"quiet,q", nullptr, "print nothing but errors"}},
    {'p', {"progress,p", nullptr, "show how far it is, in percent"}},
    {'t',
     {"cache,t", "CACHE",
      "how the image is written: none and directsync with O_DIRECT, writeback, writethrough "
      "and unsafe (no flush) through the page cache"}},
    {'T', {"source-cache,T", "CACHE", "how images are read, as -t"}},
    {'i',
     {"image-opts", nullptr,
      "images are named by options (driver=qcow2,file.filename=...) and not by a path"}},
    {'U', {"force-share,U", nullptr, "read the image although somebody may be writing to it"}},
};

void add_common_option(po::options_description& options, char letter) {
  if (letter == 's') return add_sandbox_options(options);
  for (const CommonOption& common : kCommonOptions) {
    if (common.letter == letter) add_options(options, {common.option});
  }
}

}  // namespace

ImageSyntax image_syntax(const char* usage, std::initializer_list<ImageOption> own,
                         std::string_view common) {
  ImageSyntax out;
  out.usage = usage;
  add_options(out.options, own);
  for (const char letter : common) add_common_option(out.options, letter);
  add_options(out.options,
              {{"object", "secret,id=ID,...",
                "a password or key that images are opened or made with by its id "
                "(key-secret=ID): file=PATH or data=TEXT, format=raw|base64; encrypted with "
                "another: keyid=ID,iv=BASE64"},
               {"help,h", nullptr, "this text"}});
  return out;
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

void add_secrets(const Strings& objects) {
  if (objects.empty()) return;
  // Now: a sandbox would not let it be loaded later.
  (void)block::crypto::gnutls();
  for (const std::string& text : objects) {
    const std::string type = text.substr(0, text.find(','));
    const bool known = type == "secret" || type.starts_with("tls-creds-");
    if (personality().drop_in && type.find_first_of("={") == std::string::npos && !known) {
      throw base::Error(EINVAL,
                        fmt::format("Parameter 'qom-type' does not accept value '{}'", type));
    }
    block::crypto::add_object(text);
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
    Strings words = arguments;
    if (syntax.last_is_name && !words.empty() && words.back() != "--help" && words.back() != "-h") {
      words.insert(words.end() - 1, "--");
    }
    po::command_line_parser parser(words);
    const auto names = po::positional_options_description().add("name", -1);
    const po::parsed_options parsed = parser.options(all).positional(names).style(style).run();
    po::store(parsed, values);
    Strings order;
    for (const po::option& option : parsed.options) order.push_back(option.string_key);
    values.insert({kGivenOptions, po::variable_value(order, false)});
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
  add_secrets(text_values(values, "object"));
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

std::optional<std::string> optional_text(const po::variables_map& values, const char* name) {
  if (values.count(name) == 0) return std::nullopt;
  return text_value(values, name);
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
      throw base::Error(
          EINVAL, two_messages(fmt::format("Invalid {} specified. You may use k, M, G, T, P or E "
                                           "suffixes for",
                                           what),
                               "kilobytes, megabytes, gigabytes, terabytes, petabytes and "
                               "exabytes."));
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
