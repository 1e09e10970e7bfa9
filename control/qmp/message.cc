// SPDX-License-Identifier: Apache-2.0
#include "control/qmp/message.h"

#include <chrono>
#include <new>

#include <fmt/core.h>

namespace minivmm::control::qmp {
namespace {

const char* name_of(ErrorClass error_class) noexcept {
  switch (error_class) {
    case ErrorClass::kCommandNotFound:
      return "CommandNotFound";
    case ErrorClass::kDeviceNotFound:
      return "DeviceNotFound";
    case ErrorClass::kDeviceNotActive:
      return "DeviceNotActive";
    case ErrorClass::kGenericError:
      break;
  }
  return "GenericError";
}

// A blank behind each colon and comma, as in QEMU's answers: scripts look for them as they are.
std::string spaced(std::string_view compact) {
  std::string out;
  out.reserve(compact.size() + compact.size() / 8);
  bool quoted = false;
  for (size_t i = 0; i < compact.size(); ++i) {
    const char c = compact[i];
    out += c;
    if (c == '\\' && quoted) {
      out += compact[++i];
    } else if (c == '"') {
      quoted = !quoted;
    } else if (!quoted && (c == ':' || c == ',')) {
      out += ' ';
    }
  }
  return out;
}

std::string line_of(Json message, const Json& id) {
  if (!id.is_null()) message["id"] = id;
  return spaced(dump(message)) + "\r\n";
}

}  // namespace

std::string dump(const Json& value) {
  return value.dump(-1, ' ', true, Json::error_handler_t::replace);
}

Request parse_request(const std::string& text, Json& id) {
  Json message = Json::parse(text, nullptr, false);
  if (message.is_discarded()) throw Failure("Invalid JSON syntax");
  if (!message.is_object()) throw Failure("QMP input must be a JSON object");
  if (const auto given = message.find("id"); given != message.end()) id = *given;
  Request out;
  for (auto& [key, value] : message.items()) {
    if (key == "execute") {
      if (!value.is_string()) throw Failure("QMP input member 'execute' must be a string");
      out.command = value.get<std::string>();
    } else if (key == "arguments") {
      if (!value.is_object()) throw Failure("QMP input member 'arguments' must be an object");
      out.arguments = std::move(value);
    } else if (key != "id") {
      throw Failure(fmt::format("QMP input member '{}' is unexpected", key));
    }
  }
  if (!message.contains("execute")) throw Failure("QMP input lacks member 'execute'");
  out.id = id;
  return out;
}

Json version_json() {
  // Programs look at this to know which arguments there are: those of the commands here are 7.2's.
  return {{"qemu", {{"micro", 0}, {"minor", 2}, {"major", 7}}},
          {"package", fmt::format("minivmm-{}", MINIVMM_VERSION)}};
}

std::string greeting_line() {
  return line_of({{"QMP", {{"version", version_json()}, {"capabilities", Json::array()}}}}, {});
}

std::string return_line(const Json& value, const Json& id) {
  return line_of({{"return", value}}, id);
}

std::string error_line(const std::exception_ptr& error, const Json& id) {
  ErrorClass error_class = ErrorClass::kGenericError;
  std::string text;
  try {
    std::rethrow_exception(error);
  } catch (const Failure& e) {
    error_class = e.error_class();
    text = e.what();
  } catch (const std::bad_alloc&) {
    text = "Out of memory";
  } catch (const std::exception& e) {
    text = e.what();
  }
  return line_of({{"error", {{"class", name_of(error_class)}, {"desc", text}}}}, id);
}

std::string event_line(std::string_view event, const Json& data) {
  using std::chrono::duration_cast;
  using std::chrono::microseconds;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const int64_t us = duration_cast<microseconds>(now).count();
  Json message{{"timestamp", {{"seconds", us / 1'000'000}, {"microseconds", us % 1'000'000}}},
               {"event", event}};
  if (!data.is_null()) message["data"] = data;
  return line_of(std::move(message), {});
}

}  // namespace minivmm::control::qmp
