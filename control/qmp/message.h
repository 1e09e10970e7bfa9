// SPDX-License-Identifier: Apache-2.0
// QMP's messages: what a client's text asks for, and the lines that it gets. Values, no I/O.
#pragma once

#include <string>
#include <string_view>

#include <exception>
#include <utility>

#include "control/qmp/json.h"

namespace minivmm::control::qmp {

// The classes that QMP knows and that something here uses.
enum class ErrorClass { kGenericError, kCommandNotFound, kDeviceNotFound, kDeviceNotActive };

// What a command answers instead of a value. A base::Error is a kGenericError of its text.
class Failure : public std::exception {
 public:
  Failure(ErrorClass error_class, std::string text)
      : error_class_(error_class), text_(std::move(text)) {}
  explicit Failure(std::string text) : Failure(ErrorClass::kGenericError, std::move(text)) {}
  ErrorClass error_class() const noexcept { return error_class_; }
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  ErrorClass error_class_;
  std::string text_;
};

struct Request {
  std::string command;
  Json arguments = Json::object();
  Json id;  // null: none was given
};

// Reads one. `id` is set as soon as it is known, also where a Failure is thrown.
Request parse_request(const std::string& text, Json& id);

// Lines, each with its end.
std::string greeting_line();
std::string return_line(const Json& value, const Json& id);
std::string error_line(const std::exception_ptr& error, const Json& id);
// With the time of now.
std::string event_line(std::string_view event, const Json& data);

// {"qemu": {...}, "package": "..."}: the version of the protocol's commands that ours are like, and
// ours.
Json version_json();

// As text; what is not UTF-8 (a file's name) is replaced.
std::string dump(const Json& value);

}  // namespace minivmm::control::qmp
