// SPDX-License-Identifier: Apache-2.0
#include "block/graph/options.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>

#include <fmt/core.h>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace minivmm::block {

using base::Error;

struct Options::Item {
  enum class Kind { kText, kNull, kTree };
  std::string key;
  Kind kind = Kind::kText;
  std::string text;
  Options tree;
};

Options::Options() = default;
Options::Options(const Options&) = default;
Options::Options(Options&&) noexcept = default;
Options& Options::operator=(const Options&) = default;
Options& Options::operator=(Options&&) noexcept = default;
Options::~Options() = default;

namespace {

// Deeper chains are made by reference. Reading a tree recurses, on a fiber's stack perhaps, and
// the text may come from anybody.
constexpr int kMaxNesting = 32;

void fill_from_json(Options& out, const nlohmann::ordered_json& object) {
  for (const auto& [key, value] : object.items()) {
    if (value.is_object()) {
      Options child;
      fill_from_json(child, value);
      out.set_child(key, std::move(child));
    } else if (value.is_null()) {
      out.set_null(key);
    } else if (value.is_string()) {
      out.set(key, value.get<std::string>());
    } else if (value.is_boolean()) {
      out.set(key, value.get<bool>() ? "on" : "off");
    } else if (value.is_number()) {
      out.set(key, value.dump());
    } else {
      throw Error(EINVAL, fmt::format("option '{}': a list is not expected here", key));
    }
  }
}

// File names may be any bytes; what is not UTF-8 is replaced.
std::string quoted(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

int nesting_of(std::string_view text) {
  int depth = 0;
  int most = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    if (in_string) {
      if (text[i] == '\\') ++i;
      in_string = i < text.size() && text[i] != '"';
    } else if (text[i] == '"') {
      in_string = true;
    } else if (text[i] == '{' || text[i] == '[') {
      most = std::max(most, ++depth);
    } else if (text[i] == '}' || text[i] == ']') {
      --depth;
    }
  }
  return most;
}

}  // namespace

Options Options::from_keys(std::string_view text) {
  Options out;
  size_t at = 0;
  while (at < text.size()) {
    // One "key=value" up to a single comma.
    std::string piece;
    for (; at < text.size(); ++at) {
      if (text[at] == ',') {
        if (at + 1 < text.size() && text[at + 1] == ',') {
          ++at;
        } else {
          break;
        }
      }
      piece.push_back(text[at]);
    }
    ++at;
    if (piece.empty()) continue;
    const size_t equals = piece.find('=');
    const std::string key = piece.substr(0, equals);
    if (key.empty()) throw Error(EINVAL, fmt::format("'{}': an option without a name", piece));
    if (equals == std::string::npos) {
      out.set(key, "on");
    } else if (equals + 1 == piece.size() && (key == "backing" || key.ends_with(".backing"))) {
      out.set_null(key);
    } else {
      out.set(key, piece.substr(equals + 1));
    }
  }
  return out;
}

Options Options::from_json(std::string_view text) {
  if (nesting_of(text) > kMaxNesting) {
    throw Error(EINVAL, fmt::format("JSON: nested deeper than {}", kMaxNesting));
  }
  Options out;
  try {
    const auto parsed = nlohmann::ordered_json::parse(text);
    if (!parsed.is_object()) throw Error(EINVAL, "JSON: an object is expected");
    fill_from_json(out, parsed);
  } catch (const nlohmann::json::exception& e) {
    throw Error(EINVAL, fmt::format("JSON: {}", e.what()));
  }
  return out;
}

Options Options::from_text(std::string_view text) {
  return text.starts_with('{') ? from_json(text) : from_keys(text);
}

Options::Item* Options::find(std::string_view key) {
  for (Item& item : items_) {
    if (item.key == key) return &item;
  }
  return nullptr;
}

const Options::Item* Options::find(std::string_view key) const {
  for (const Item& item : items_) {
    if (item.key == key) return &item;
  }
  return nullptr;
}

std::optional<Options::Item> Options::take(std::string_view key) {
  if (const size_t dot = key.find('.'); dot != std::string_view::npos) {
    Item* const group = find(key.substr(0, dot));
    if (group == nullptr || group->kind != Item::Kind::kTree) return std::nullopt;
    auto item = group->tree.take(key.substr(dot + 1));
    if (group->tree.empty()) (void)take(key.substr(0, dot));
    return item;
  }
  for (size_t i = 0; i < items_.size(); ++i) {
    if (items_[i].key != key) continue;
    Item item = std::move(items_[i]);
    items_.erase(items_.begin() + static_cast<ptrdiff_t>(i));
    return item;
  }
  return std::nullopt;
}

Options::Item& Options::make(std::string_view dotted_key) {
  if (std::count(dotted_key.begin(), dotted_key.end(), '.') > kMaxNesting) {
    throw Error(EINVAL, fmt::format("an option nested deeper than {}", kMaxNesting));
  }
  const size_t dot = dotted_key.find('.');
  const std::string_view key = dotted_key.substr(0, dot);
  Item* item = find(key);
  if (dot == std::string_view::npos) {
    if (item != nullptr) {
      throw Error(EINVAL, fmt::format("option '{}' is given twice", dotted_key));
    }
    items_.emplace_back();
    items_.back().key = key;
    return items_.back();
  }
  if (item == nullptr) {
    items_.emplace_back();
    item = &items_.back();
    item->key = key;
    item->kind = Item::Kind::kTree;
  }
  if (item->kind != Item::Kind::kTree) {
    throw Error(EINVAL, fmt::format("option '{}' has a value already, so '{}' cannot be set", key,
                                    dotted_key));
  }
  return item->tree.make(dotted_key.substr(dot + 1));
}

void Options::set(std::string_view dotted_key, std::string value) {
  make(dotted_key).text = std::move(value);
}

void Options::set_null(std::string_view dotted_key) { make(dotted_key).kind = Item::Kind::kNull; }

void Options::set_child(std::string_view dotted_key, Options child) {
  Item& item = make(dotted_key);
  item.kind = Item::Kind::kTree;
  item.tree = std::move(child);
}

bool Options::has(std::string_view key) const { return find(key) != nullptr; }

std::optional<std::string> Options::peek(std::string_view key) const {
  const Item* item = find(key);
  if (item == nullptr || item->kind != Item::Kind::kText) return std::nullopt;
  return item->text;
}

std::vector<std::string> Options::keys() const {
  std::vector<std::string> out;
  for (const Item& item : items_) out.push_back(item.key);
  return out;
}

std::optional<std::string> Options::take_string(std::string_view key) {
  auto item = take(key);
  if (!item) return std::nullopt;
  if (item->kind != Item::Kind::kText) {
    throw Error(EINVAL, fmt::format("option '{}': a plain value is expected", key));
  }
  return std::move(item->text);
}

std::string Options::require_string(std::string_view key) {
  auto value = take_string(key);
  if (!value || value->empty()) throw Error(EINVAL, fmt::format("option '{}' is missing", key));
  return std::move(*value);
}

bool Options::take_bool(std::string_view key, bool otherwise) {
  const auto value = take_string(key);
  if (!value) return otherwise;
  for (const char* yes : {"on", "yes", "true", "y"}) {
    if (*value == yes) return true;
  }
  for (const char* no : {"off", "no", "false", "n"}) {
    if (*value == no) return false;
  }
  throw Error(EINVAL, fmt::format("option '{}={}': on or off is expected", key, *value));
}

std::optional<uint64_t> Options::take_size(std::string_view key) {
  const auto value = take_string(key);
  if (!value) return std::nullopt;
  return parse_size(*value, key);
}

uint64_t Options::take_uint(std::string_view key, uint64_t otherwise, uint64_t min, uint64_t max) {
  const auto value = take_string(key);
  if (!value) return otherwise;
  uint64_t number = 0;
  const auto [end, error] =
      std::from_chars(value->data(), value->data() + value->size(), number, 10);
  if (error != std::errc() || end != value->data() + value->size() || number < min ||
      number > max) {
    throw Error(EINVAL, fmt::format("option '{}={}': a number from {} to {} is expected", key,
                                    *value, min, max));
  }
  return number;
}

size_t Options::take_choice(std::string_view key, const std::vector<std::string_view>& choices,
                            size_t otherwise) {
  const auto value = take_string(key);
  if (!value) return otherwise;
  std::string list;
  for (size_t i = 0; i < choices.size(); ++i) {
    if (*value == choices[i]) return i;
    list += fmt::format("{}{}", i == 0 ? "" : ", ", choices[i]);
  }
  throw Error(EINVAL, fmt::format("option '{}={}': one of {} is expected", key, *value, list));
}

bool Options::take_null(std::string_view key) {
  const Item* item = find(key);
  if (item == nullptr || item->kind != Item::Kind::kNull) return false;
  (void)take(key);
  return true;
}

std::optional<Options::Child> Options::take_child(std::string_view key) {
  auto item = take(key);
  if (!item || item->kind == Item::Kind::kNull) return std::nullopt;
  Child child;
  if (item->kind == Item::Kind::kTree) {
    child.options = std::make_unique<Options>(std::move(item->tree));
  } else {
    child.reference = std::move(item->text);
    if (child.reference.empty()) {
      throw Error(EINVAL, fmt::format("option '{}': a node-name is expected", key));
    }
  }
  return child;
}

void Options::finish(std::string_view what) const {
  if (items_.empty()) return;
  throw Error(EINVAL, fmt::format("{}: unknown option '{}'", what, items_.front().key));
}

std::string Options::to_json() const {
  std::string out = "{";
  for (const Item& item : items_) {
    if (out.size() > 1) out += ", ";
    out += quoted(item.key) + ": ";
    switch (item.kind) {
      case Item::Kind::kText:
        out += quoted(item.text);
        break;
      case Item::Kind::kNull:
        out += "null";
        break;
      case Item::Kind::kTree:
        out += item.tree.to_json();
        break;
    }
  }
  return out + "}";
}

uint64_t parse_size(std::string_view text, std::string_view what) {
  const auto bad = [&] {
    return Error(EINVAL, fmt::format("option '{}={}': a size such as 65536, 64K or 1.5G is "
                                     "expected",
                                     what, text));
  };
  if (text.empty() || text[0] == '-' || text[0] == '+') throw bad();
  if (text.starts_with("0x") || text.starts_with("0X")) {
    uint64_t value = 0;
    const auto [end, error] =
        std::from_chars(text.data() + 2, text.data() + text.size(), value, 16);
    if (error != std::errc() || end != text.data() + text.size()) throw bad();
    return value;
  }
  uint64_t whole = 0;
  auto [at, error] = std::from_chars(text.data(), text.data() + text.size(), whole, 10);
  if (error != std::errc()) throw bad();
  const char* const end = text.data() + text.size();
  double fraction = 0;
  if (at != end && *at == '.') {
    double scale = 0.1;
    for (++at; at != end && *at >= '0' && *at <= '9'; ++at, scale /= 10) {
      fraction += scale * (*at - '0');
    }
  }
  unsigned shift = 0;
  if (at != end) {
    static constexpr std::string_view kSuffixes = "bkmgtpe";
    const size_t i = kSuffixes.find(static_cast<char>(*at | 0x20));
    if (i == std::string_view::npos || at + 1 != end) throw bad();
    shift = static_cast<unsigned>(i) * 10;
  }
  if (shift == 0 && fraction != 0) throw bad();
  if (shift != 0 && whole > (~uint64_t{0} >> shift)) throw bad();
  const uint64_t scaled = whole << shift;
  const auto extra = static_cast<uint64_t>(std::ldexp(fraction, static_cast<int>(shift)));
  if (scaled + extra < scaled) throw bad();
  return scaled + extra;
}

}  // namespace minivmm::block
