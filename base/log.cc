// SPDX-License-Identifier: Apache-2.0
#include "base/log.h"

#include <cstdlib>
#include <memory>

#include <spdlog/sinks/ansicolor_sink.h>
#include <spdlog/spdlog.h>
#include <time.h>

namespace minivmm::base {
namespace {

std::atomic<LogLevel> g_level{LogLevel::kInfo};

spdlog::level::level_enum to_spdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
    case LogLevel::kOff:
      break;
  }
  return spdlog::level::off;
}

// The sink decides about colour: a terminal, and NO_COLOR (https://no-color.org) not set.
spdlog::logger& logger() {
  static const std::unique_ptr<spdlog::logger> instance = [] {
    const char* no_color = std::getenv("NO_COLOR");
    const bool plain = no_color != nullptr && *no_color != '\0';
    auto sink = std::make_shared<spdlog::sinks::ansicolor_stderr_sink_mt>(
        plain ? spdlog::color_mode::never : spdlog::color_mode::automatic);
    auto made = std::make_unique<spdlog::logger>("minivmm", std::move(sink));
    made->set_pattern("minivmm: %^%l%$: %v");
    made->set_level(spdlog::level::debug);
    made->flush_on(spdlog::level::debug);
    return made;
  }();
  return *instance;
}

}  // namespace

void set_log_level(LogLevel level) noexcept { g_level.store(level, std::memory_order_relaxed); }

bool log_enabled(LogLevel level) noexcept {
  return level >= g_level.load(std::memory_order_relaxed) && level != LogLevel::kOff;
}

void log_text(LogLevel level, std::string_view text) noexcept {
  try {
    logger().log(to_spdlog(level), spdlog::string_view_t(text.data(), text.size()));
  } catch (...) {
    // Logging must never be what fails a request.
  }
}

bool RateLimit::allow(uint64_t* suppressed) noexcept {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  const uint64_t second = static_cast<uint64_t>(now.tv_sec) & 0xffffffff;
  uint64_t old = window_.load(std::memory_order_relaxed);
  for (;;) {
    const bool same = (old >> 32) == second;
    const uint64_t count = same ? (old & 0xffffffff) : 0;
    if (count >= burst_) {
      suppressed_.fetch_add(1, std::memory_order_relaxed);
      return false;
    }
    if (window_.compare_exchange_weak(old, second << 32 | (count + 1), std::memory_order_relaxed)) {
      *suppressed = suppressed_.exchange(0, std::memory_order_relaxed);
      return true;
    }
  }
}

}  // namespace minivmm::base
