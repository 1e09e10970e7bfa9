// SPDX-License-Identifier: Apache-2.0
// Logging to stderr. Any thread. Levels are spdlog's; this header keeps spdlog out of every other
// one. Messages name the thing they speak of first ("overlay.qcow2: ...").
//
// A guest or a client that can make us log must not be able to flood the log: such sites use
// RateLimit.
#pragma once

#include <string_view>

#include <atomic>
#include <cstdint>

#include <fmt/core.h>

namespace minivmm::base {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kOff };

void set_log_level(LogLevel level) noexcept;
bool log_enabled(LogLevel level) noexcept;
void log_text(LogLevel level, std::string_view text) noexcept;

template <typename... Args>
void log(LogLevel level, fmt::format_string<Args...> format, Args&&... args) {
  if (log_enabled(level)) log_text(level, fmt::format(format, std::forward<Args>(args)...));
}
template <typename... Args>
void log_debug(fmt::format_string<Args...> format, Args&&... args) {
  log(LogLevel::kDebug, format, std::forward<Args>(args)...);
}
template <typename... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  log(LogLevel::kInfo, format, std::forward<Args>(args)...);
}
template <typename... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  log(LogLevel::kWarning, format, std::forward<Args>(args)...);
}
template <typename... Args>
void log_error(fmt::format_string<Args...> format, Args&&... args) {
  log(LogLevel::kError, format, std::forward<Args>(args)...);
}

// At most `burst` messages in any one-second window; the rest are counted. Any thread.
class RateLimit {
 public:
  explicit RateLimit(uint32_t burst = 5) noexcept : burst_(burst) {}
  // True if the caller may log now. `*suppressed` receives how many were swallowed since the
  // last allowed one.
  bool allow(uint64_t* suppressed) noexcept;

 private:
  const uint32_t burst_;
  std::atomic<uint64_t> window_{0};  // seconds << 32 | count
  std::atomic<uint64_t> suppressed_{0};
};

}  // namespace minivmm::base
