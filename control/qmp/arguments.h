// SPDX-License-Identifier: Apache-2.0
// The arguments of a command: what it takes, written down as a table, and what a client gave,
// checked against that, with QMP's words for what is wrong. Values, no I/O.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "control/qmp/json.h"

namespace minivmm::control::qmp {

enum class Kind : uint8_t { kString, kInteger, kBoolean, kStrings, kObject, kList };

struct Parameter {
  const char* name;
  Kind kind;
  bool optional = false;
  // Of a kString: the words that it may be, '|' between them; null: any.
  const char* choices = nullptr;
};

class Arguments {
 public:
  // Throws Failure: one is missing, unexpected, or of another type.
  Arguments(std::span<const Parameter> parameters, Json given);
  // Of a command whose arguments others know: blockdev-add.
  explicit Arguments(Json given) : given_(std::move(given)) {}

  bool has(std::string_view name) const { return given_.contains(name); }
  // Each is of the kind that the table says; one that is optional and not given is as said here.
  std::string text(std::string_view name, const std::string& otherwise = {}) const;
  bool boolean(std::string_view name, bool otherwise = false) const;
  // Throws Failure unless it is from `least` to `most`.
  uint64_t integer(std::string_view name, uint64_t least, uint64_t most,
                   uint64_t otherwise = 0) const;
  std::vector<std::string> strings(std::string_view name) const;
  const Json& json(std::string_view name) const;
  const Json& all() const noexcept { return given_; }

 private:
  Json given_;
};

}  // namespace minivmm::control::qmp
