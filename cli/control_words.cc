// SPDX-License-Identifier: Apache-2.0
#include "cli/control_words.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/options.h"
#include "control/qmp/command.h"

namespace minivmm::cli {

using base::Error;
using control::qmp::Command;
using control::qmp::Json;
using control::qmp::Kind;
using control::qmp::Parameter;

namespace {

const Parameter* find_parameter(const Command* command, const std::string& key) {
  if (command == nullptr) return nullptr;
  const auto found = std::find_if(command->parameters.begin(), command->parameters.end(),
                                  [&](const Parameter& each) { return key == each.name; });
  return found != command->parameters.end() ? &*found : nullptr;
}

Json any_value(const std::string& text) {
  Json out = Json::parse(text, nullptr, false);
  return out.is_discarded() ? Json(text) : out;
}

Json value_of(const Parameter* parameter, const std::string& key, const std::string& text) {
  if (parameter == nullptr) return any_value(text);
  switch (parameter->kind) {
    case Kind::kString:
      return text;
    case Kind::kInteger:
      return text.starts_with('-') ? any_value(text) : Json(block::parse_size(text, key));
    case Kind::kBoolean:
      if (text == "on" || text == "yes") return true;
      if (text == "off" || text == "no") return false;
      return any_value(text);
    case Kind::kStrings:
    case Kind::kList:
      // One needs no brackets.
      return text.starts_with('[') ? any_value(text) : Json::array({any_value(text)});
    case Kind::kObject:
      break;
  }
  return any_value(text);
}

void add_argument(Json& arguments, const Command* command, const std::string& word) {
  const size_t equals = word.find('=');
  if (equals == 0 || equals == std::string::npos) {
    throw Error(EINVAL, fmt::format("'{}': key=value is expected, or a JSON object", word));
  }
  const std::string key = word.substr(0, equals);
  const std::string text = word.substr(equals + 1);
  Json* at = &arguments;
  size_t begin = 0;
  for (size_t dot = key.find('.'); dot != std::string::npos; dot = key.find('.', begin)) {
    at = &(*at)[key.substr(begin, dot - begin)];
    if (!at->is_null() && !at->is_object()) {
      throw Error(EINVAL, fmt::format("'{}': a part of the key has a value already", word));
    }
    begin = dot + 1;
  }
  const std::string last = key.substr(begin);
  if (at->is_object() && at->contains(last)) {
    throw Error(EINVAL, fmt::format("'{}': the key is given twice", word));
  }
  // What lies inside an object is not in the tables.
  (*at)[last] = begin == 0 ? value_of(find_parameter(command, key), key, text) : any_value(text);
}

Json object_of(const std::string& word) {
  Json out = Json::parse(word, nullptr, false);
  if (!out.is_object()) throw Error(EINVAL, fmt::format("no JSON object: {}", word));
  return out;
}

}  // namespace

Json control_message(const std::vector<std::string>& words) {
  if (words.empty()) throw Error(EINVAL, "a command is expected");
  if (words[0].starts_with('{')) {
    if (words.size() > 1) throw Error(EINVAL, "nothing is expected behind a whole message");
    return object_of(words[0]);
  }
  Json out{{"execute", words[0]}};
  const Command* const command = control::qmp::find_command(words[0]);
  Json arguments = Json::object();
  for (size_t i = 1; i < words.size(); ++i) {
    if (words[i].starts_with('{') && words.size() == 2) {
      arguments = object_of(words[i]);
    } else {
      add_argument(arguments, command, words[i]);
    }
  }
  if (!arguments.empty()) out["arguments"] = std::move(arguments);
  return out;
}

std::vector<std::string> control_line_words(const std::string& line) {
  // A whole message may have blanks anywhere.
  const size_t first = line.find_first_not_of(" \t\r");
  if (first == std::string::npos) return {};
  if (line[first] == '{') return {line.substr(first)};
  std::vector<std::string> out;
  std::string word;
  bool inside = false;
  char quote = 0;
  for (size_t i = first; i < line.size(); ++i) {
    const char c = line[i];
    if (quote == 0 && (c == ' ' || c == '\t' || c == '\r')) {
      if (inside) out.push_back(std::move(word));
      word.clear();
      inside = false;
      continue;
    }
    inside = true;
    if (c == '\\' && quote != '\'' && i + 1 < line.size()) {
      word += line[++i];
    } else if (quote != 0 ? c == quote : c == '\'' || c == '"') {
      quote = quote != 0 ? '\0' : c;
    } else {
      word += c;
    }
  }
  if (quote != 0) throw Error(EINVAL, fmt::format("a quote ({}) is not closed", quote));
  if (inside) out.push_back(std::move(word));
  return out;
}

namespace {

std::string shape_of(const Parameter& parameter) {
  const auto value = [&]() -> std::string {
    if (parameter.choices != nullptr) return parameter.choices;
    switch (parameter.kind) {
      case Kind::kString:
        return "TEXT";
      case Kind::kInteger:
        return "NUMBER";
      case Kind::kBoolean:
        return "on|off";
      case Kind::kObject:
        return "{...}";
      case Kind::kStrings:
      case Kind::kList:
        break;
    }
    return "[...]";
  }();
  const std::string text = fmt::format("{}={}", parameter.name, value);
  return parameter.optional ? "[" + text + "]" : text;
}

}  // namespace

std::string control_command_list() {
  constexpr size_t kWidth = 96;
  std::string out;
  for (const Command* command : control::qmp::all_commands()) {
    std::string line = fmt::format("  {}", command->name);
    const auto add = [&](const std::string& shape) {
      if (line.size() + 1 + shape.size() > kWidth) {
        out += line + "\n";
        line = "     ";
      }
      line += " " + shape;
    };
    for (const Parameter& each : command->parameters) add(shape_of(each));
    if (command->any_arguments) add("KEY=VALUE...");
    out += line + "\n";
  }
  return out;
}

}  // namespace minivmm::cli
