// SPDX-License-Identifier: Apache-2.0
#include "control/qmp/arguments.h"

#include <algorithm>

#include <fmt/core.h>

#include "control/qmp/message.h"

namespace minivmm::control::qmp {
namespace {

const char* name_of(Kind kind) noexcept {
  switch (kind) {
    case Kind::kString:
      return "string";
    case Kind::kInteger:
      return "integer";
    case Kind::kBoolean:
      return "boolean";
    case Kind::kObject:
      return "object";
    case Kind::kStrings:
    case Kind::kList:
      break;
  }
  return "array";
}

bool is_of(Kind kind, const Json& value) {
  switch (kind) {
    case Kind::kString:
      return value.is_string();
    case Kind::kInteger:
      return value.is_number_integer();
    case Kind::kBoolean:
      return value.is_boolean();
    case Kind::kObject:
      return value.is_object();
    case Kind::kList:
      return value.is_array();
    case Kind::kStrings:
      return value.is_array() && std::all_of(value.begin(), value.end(),
                                             [](const Json& each) { return each.is_string(); });
  }
  return false;
}

bool is_among(std::string_view choices, const std::string& value) {
  while (!choices.empty()) {
    const size_t end = std::min(choices.find('|'), choices.size());
    if (choices.substr(0, end) == value) return true;
    choices.remove_prefix(std::min(end + 1, choices.size()));
  }
  return false;
}

void check(const Parameter& parameter, const Json& value) {
  if (!is_of(parameter.kind, value)) {
    throw Failure(fmt::format("Invalid parameter type for '{}', expected: {}", parameter.name,
                              name_of(parameter.kind)));
  }
  if (parameter.choices == nullptr) return;
  const auto text = value.get<std::string>();
  if (!is_among(parameter.choices, text)) {
    throw Failure(fmt::format("Parameter '{}' does not accept value '{}' (it is one of {})",
                              parameter.name, text, parameter.choices));
  }
}

}  // namespace

Arguments::Arguments(std::span<const Parameter> parameters, Json given) : given_(std::move(given)) {
  for (const auto& [key, value] : given_.items()) {
    const auto found =
        std::find_if(parameters.begin(), parameters.end(),
                     [&key = key](const Parameter& each) { return key == each.name; });
    if (found == parameters.end()) throw Failure(fmt::format("Parameter '{}' is unexpected", key));
    check(*found, value);
  }
  for (const Parameter& each : parameters) {
    if (!each.optional && !given_.contains(each.name)) {
      throw Failure(fmt::format("Parameter '{}' is missing", each.name));
    }
  }
}

std::string Arguments::text(std::string_view name, const std::string& otherwise) const {
  const auto found = given_.find(name);
  return found != given_.end() ? found->get<std::string>() : otherwise;
}

bool Arguments::boolean(std::string_view name, bool otherwise) const {
  const auto found = given_.find(name);
  return found != given_.end() ? found->get<bool>() : otherwise;
}

uint64_t Arguments::integer(std::string_view name, uint64_t least, uint64_t most,
                            uint64_t otherwise) const {
  const auto found = given_.find(name);
  if (found == given_.end()) return otherwise;
  const bool negative = !found->is_number_unsigned() && found->get<int64_t>() < 0;
  const uint64_t value = negative ? 0 : found->get<uint64_t>();
  if (negative || value < least || value > most) {
    throw Failure(fmt::format("Parameter '{}' is expected to be from {} to {}", name, least, most));
  }
  return value;
}

std::vector<std::string> Arguments::strings(std::string_view name) const {
  const auto found = given_.find(name);
  return found != given_.end() ? found->get<std::vector<std::string>>()
                               : std::vector<std::string>();
}

const Json& Arguments::json(std::string_view name) const {
  static const Json none;
  const auto found = given_.find(name);
  return found != given_.end() ? *found : none;
}

}  // namespace minivmm::control::qmp
