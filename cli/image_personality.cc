// SPDX-License-Identifier: Apache-2.0
#include "cli/image_personality.h"

#include <cstdio>
#include <utility>

#include <fmt/core.h>

namespace minivmm::cli {

namespace {

Personality& current() noexcept {
  static Personality instance;
  return instance;
}

}  // namespace

const Personality& personality() noexcept { return current(); }

void set_personality(Personality personality) { current() = std::move(personality); }

bool is_called(std::string_view argv0, std::string_view name) noexcept {
  const size_t slash = argv0.rfind('/');
  if (slash != std::string_view::npos) argv0.remove_prefix(slash + 1);
  return argv0 == name;
}

std::string hint(std::string_view text) {
  return personality().drop_in ? std::string() : std::string(text);
}

std::string two_messages(std::string_view first, std::string_view second) {
  const std::string prefix =
      personality().drop_in ? fmt::format("{}: ", personality().program) : std::string();
  return fmt::format("{}\n{}{}", first, prefix, second);
}

void print_error(std::string_view text) {
  std::fflush(stdout);
  fmt::print(stderr, "{}: {}\n", personality().program, text);
}

void print_warning(std::string_view text) { print_error(fmt::format("warning: {}", text)); }

}  // namespace minivmm::cli
