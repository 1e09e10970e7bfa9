// SPDX-License-Identifier: Apache-2.0
#include "cli/image_create_options.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

using base::Error;
using Kind = CreateOption::Kind;

namespace {

// What is not the format's but its file's.
constexpr CreateOption kFilePreallocation{"preallocation", Kind::kText, "",
                                          "Preallocation mode (allowed values: off, falloc, full)",
                                          true};
constexpr CreateOption kNoCow{"nocow", Kind::kBool, "",
                              "Turn off copy-on-write (valid only on btrfs)", true};
constexpr CreateOption kExtentSizeHint{"extent_size_hint", Kind::kSize, "",
                                       "Extent size hint for the image file, 0 to disable", true};

// In the order in which qemu-img prints them.
constexpr CreateOption kQcow2Options[] = {
    {"encryption", Kind::kBool, "",
     "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"},
    {"encrypt.format", Kind::kText, "", "Encrypt the image, format choices: 'aes', 'luks'"},
    {"encrypt.key-secret", Kind::kText, "",
     "ID of secret providing qcow AES key or LUKS passphrase"},
    {"encrypt.cipher-alg", Kind::kText, "", "Name of encryption cipher algorithm"},
    {"encrypt.cipher-mode", Kind::kText, "", "Name of encryption cipher mode"},
    {"encrypt.ivgen-alg", Kind::kText, "", "Name of IV generator algorithm"},
    {"encrypt.ivgen-hash-alg", Kind::kText, "", "Name of IV generator hash algorithm"},
    {"encrypt.hash-alg", Kind::kText, "", "Name of encryption hash algorithm"},
    {"encrypt.iter-time", Kind::kNumber, "", "Time to spend in PBKDF in milliseconds"},
    {"cluster_size", Kind::kSize, "65536", "qcow2 cluster size"},
    {"extended_l2", Kind::kBool, "off", "Extended L2 tables"},
    {"preallocation", Kind::kText, "",
     "Preallocation mode (allowed values: off, metadata, falloc, full)"},
    {"compression_type", Kind::kText, "zlib",
     "Compression method used for image cluster compression"},
    {"size", Kind::kSize, "", "Virtual disk size"},
    {"compat", Kind::kText, "", "Compatibility level (v2 [0.10] or v3 [1.1])"},
    {"backing_file", Kind::kText, "", "File name of a base image"},
    {"backing_fmt", Kind::kText, "", "Image format of the base image"},
    {"data_file", Kind::kText, "", "File name of an external data file"},
    {"data_file_raw", Kind::kBool, "", "The external data file must stay valid as a raw image"},
    {"lazy_refcounts", Kind::kBool, "off", "Postpone refcount updates"},
    {"refcount_bits", Kind::kNumber, "16", "Width of a reference count entry in bits"},
    kNoCow,
    kExtentSizeHint,
};

constexpr CreateOption kRawOptions[] = {
    {"size", Kind::kSize, "", "Virtual disk size"},
    kFilePreallocation,
    kNoCow,
    kExtentSizeHint,
};

constexpr CreateOption kLuksOptions[] = {
    {"size", Kind::kSize, "", "Virtual disk size"},
    {"key-secret", Kind::kText, "", "ID of the secret that provides the keyslot passphrase"},
    {"cipher-alg", Kind::kText, "", "Name of encryption cipher algorithm"},
    {"cipher-mode", Kind::kText, "", "Name of encryption cipher mode"},
    {"ivgen-alg", Kind::kText, "", "Name of IV generator algorithm"},
    {"ivgen-hash-alg", Kind::kText, "", "Name of IV generator hash algorithm"},
    {"hash-alg", Kind::kText, "", "Name of encryption hash algorithm"},
    {"iter-time", Kind::kNumber, "", "Time to spend in PBKDF in milliseconds"},
    kFilePreallocation,
    kNoCow,
    kExtentSizeHint,
};

constexpr CreateOption kLuksAmendOptions[] = {
    {"state", Kind::kText, "", "Select new state of affected keyslots (active/inactive)"},
    {"keyslot", Kind::kNumber, "", "Select a single keyslot to modify explicitly"},
    {"old-secret", Kind::kText, "", "Select all keyslots that match this password"},
    {"new-secret", Kind::kText, "",
     "New secret to set in the matching keyslots. Empty string to erase"},
    {"iter-time", Kind::kNumber, "", "Time to spend in PBKDF in milliseconds"},
};

constexpr CreateOption kQcow2AmendOptions[] = {
    {"size", Kind::kSize, "", "Virtual disk size"},
    {"compat", Kind::kText, "", "Compatibility level (v2 [0.10] or v3 [1.1])"},
    {"backing_file", Kind::kText, "", "File name of a base image"},
    {"backing_fmt", Kind::kText, "", "Image format of the base image"},
    {"data_file", Kind::kText, "", "File name of an external data file"},
    {"data_file_raw", Kind::kBool, "", "The external data file must stay valid as a raw image"},
    {"lazy_refcounts", Kind::kBool, "", "Postpone refcount updates"},
    {"refcount_bits", Kind::kNumber, "", "Width of a reference count entry in bits"},
    {"encrypt.state", Kind::kText, "", "Select new state of affected keyslots (active/inactive)"},
    {"encrypt.keyslot", Kind::kNumber, "", "Select a single keyslot to modify explicitly"},
    {"encrypt.old-secret", Kind::kText, "", "Select all keyslots that match this password"},
    {"encrypt.new-secret", Kind::kText, "",
     "New secret to set in the matching keyslots. Empty string to erase"},
    {"encrypt.iter-time", Kind::kNumber, "", "Time to spend in PBKDF in milliseconds"},
};

struct Format {
  std::string_view name;
  std::span<const CreateOption> options;
};

constexpr Format kFormats[] = {
    {"qcow2", kQcow2Options}, {"raw", kRawOptions}, {"luks", kLuksOptions}};
constexpr Format kAmendable[] = {{"luks", kLuksAmendOptions}, {"qcow2", kQcow2AmendOptions}};

std::string_view kind_text(Kind kind) {
  switch (kind) {
    case Kind::kSize:
      return "<size>";
    case Kind::kNumber:
      return "<num>";
    case Kind::kBool:
      return "<bool (on/off)>";
    default:
      return "<str>";
  }
}

std::optional<uint64_t> parse_number(std::string_view text) {
  uint64_t value = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value, 10);
  if (parsed.ec != std::errc() || parsed.ptr != end) return std::nullopt;
  return value;
}

std::optional<bool> parse_bool(std::string_view text) {
  for (const char* yes : {"on", "yes", "true", "y"}) {
    if (text == yes) return true;
  }
  for (const char* no : {"off", "no", "false", "n"}) {
    if (text == no) return false;
  }
  return std::nullopt;
}

// In qemu-img's words.
void check_value(const CreateOption& option, const std::string& text) {
  const auto wrong = [&](std::string_view expects) {
    return Error(EINVAL, fmt::format("Parameter '{}' expects {}", option.name, expects));
  };
  if (option.kind == Kind::kNumber && !parse_number(text)) throw wrong("a number");
  if (option.kind == Kind::kBool && !parse_bool(text)) throw wrong("'on' or 'off'");
  if (option.kind == Kind::kSize) {
    try {
      (void)block::parse_size(text, option.name);
    } catch (const Error&) {
      throw wrong(
          "a non-negative number below 2^64\n"
          "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
          "and exabytes, respectively.");
    }
  }
}

// "name=value" up to a single comma; doubled ones are undoubled.
std::string take_piece(std::string_view& text) {
  std::string piece;
  size_t at = 0;
  for (; at < text.size(); ++at) {
    if (text[at] == ',') {
      if (at + 1 >= text.size() || text[at + 1] != ',') break;
      ++at;
    }
    piece.push_back(text[at]);
  }
  text.remove_prefix(std::min(at + 1, text.size()));
  return piece;
}

}  // namespace

CreateOptionList::CreateOptionList(std::string_view format) {
  for (const Format& known : kFormats) {
    if (known.name != format) continue;
    format_ = known.name;
    options_ = known.options;
    return;
  }
  throw Error(EINVAL, fmt::format("Unknown file format '{}'{}", format,
                                  hint(" (qcow2, raw and luks can be created)")));
}

CreateOptionList CreateOptionList::for_amend(std::string_view format) {
  for (const Format& known : kAmendable) {
    if (known.name == format) return CreateOptionList(known.name, known.options);
  }
  (void)CreateOptionList(format);  // there is no such format
  throw Error(ENOTSUP, fmt::format("Format driver '{}' does not support option amendment", format));
}

bool CreateOptionList::asks_for_help(std::string_view text) {
  while (!text.empty()) {
    const std::string piece = take_piece(text);
    if (piece == "help" || piece == "?") return true;
  }
  return false;
}

std::string CreateOptionList::help(bool of_a_file) const {
  std::vector<const CreateOption*> sorted;
  for (const CreateOption& option : options_) {
    if (of_a_file || !option.of_file) sorted.push_back(&option);
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const auto* a, const auto* b) { return a->name < b->name; });
  std::string out = amends_     ? fmt::format("Amend options for '{}':\n", format_)
                    : of_a_file ? std::string("Supported options:\n")
                                : fmt::format("Supported {} options:\n", format_);
  for (const CreateOption* option : sorted) {
    const std::string left = fmt::format("{}={}", option->name, kind_text(option->kind));
    out += fmt::format("  {:<22} - {}\n", left, option->help);
  }
  if (!amends_ && !of_a_file) {
    out +=
        "\nThe protocol level may support further options.\n"
        "Specify the target filename to include those options.\n";
  }
  return out;
}

const CreateOption& CreateOptionList::option(std::string_view name) const {
  for (const CreateOption& known : options_) {
    if (known.name == name) return known;
  }
  const std::string invalid = fmt::format("Invalid parameter '{}'", name);
  if (amends_) {
    for (const Format& format : kFormats) {
      if (format.name != format_) continue;
      for (const CreateOption& known : format.options) {
        if (known.name != name) continue;
        throw Error(EINVAL, invalid + "\nThis option is only supported for image creation");
      }
    }
  }
  throw Error(EINVAL, invalid);
}

void CreateOptionList::parse(std::string_view text) {
  std::string_view rest = text;
  // As qemu-img: a list that ends in a comma is a mistake.
  if (text.empty() || text.front() == ',' || (text.back() == ',' && !text.ends_with(",,"))) {
    throw Error(EINVAL, fmt::format("Invalid option list: {}", text));
  }
  while (!rest.empty()) {
    const std::string piece = take_piece(rest);
    const size_t equals = piece.find('=');
    if (equals == std::string::npos) {
      if (option(piece).kind != Kind::kBool) {
        throw Error(EINVAL, fmt::format("Parameter '{0}' has no value: write {0}=...", piece));
      }
      set(piece, "on");
    } else {
      set(piece.substr(0, equals), piece.substr(equals + 1));
    }
  }
}

void CreateOptionList::set(std::string_view name, std::string value) {
  const CreateOption& known = option(name);
  check_value(known, value);
  std::erase_if(values_, [&](const Value& v) { return v.option == &known; });
  values_.push_back({&known, std::move(value)});
}

const CreateOptionList::Value* CreateOptionList::find(std::string_view name) const {
  for (const Value& value : values_) {
    if (value.option->name == name) return &value;
  }
  return nullptr;
}

std::string CreateOptionList::get(std::string_view name) const {
  const Value* value = find(name);
  return value != nullptr ? value->text : std::string();
}

std::optional<uint64_t> CreateOptionList::bytes(std::string_view name) const {
  const Value* value = find(name);
  if (value == nullptr) return std::nullopt;
  return block::parse_size(value->text, name);
}

bool CreateOptionList::is_on(std::string_view name) const {
  const Value* value = find(name);
  return value != nullptr && parse_bool(value->text).value_or(false);
}

bool CreateOptionList::encrypted() const { return has("encrypt.format") || is_on("encryption"); }

std::string CreateOptionList::formatted() const {
  std::string out;
  for (const CreateOption& known : options_) {
    const Value* value = find(known.name);
    std::string text(value != nullptr ? value->text : known.initial);
    if (text.empty()) continue;
    if (known.kind == Kind::kSize) text = fmt::format("{}", block::parse_size(text, known.name));
    if (known.kind == Kind::kNumber) text = fmt::format("{}", *parse_number(text));
    for (size_t at = text.find(','); at != std::string::npos; at = text.find(',', at + 2)) {
      text.insert(at, 1, ',');
    }
    out += fmt::format("{}{}={}", out.empty() ? "" : " ", known.name, text);
  }
  return out;
}

block::Options CreateOptionList::for_driver() const {
  block::Options out;
  for (const Value& value : values_) {
    const std::string_view name = value.option->name;
    if (name == kNoCow.name || name == kExtentSizeHint.name) continue;
    out.set(name, value.text);
  }
  return out;
}

}  // namespace minivmm::cli
