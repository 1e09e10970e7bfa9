// SPDX-License-Identifier: Apache-2.0
// Under which name the image tool was called. As `qemu-img` it says what qemu-img says, word for
// word where scripts read it, and trusts images as qemu-img does; as `minivmm image` its messages
// say more, and images are not trusted. Set once by main, before anything else.
#pragma once

#include <string>
#include <string_view>

namespace minivmm::cli {

struct Personality {
  std::string program = "minivmm";
  bool drop_in = false;  // called as qemu-img
};

const Personality& personality() noexcept;
void set_personality(Personality personality);

inline constexpr const char* kQemuNbd = "qemu-nbd";

// True of "qemu-img" for "qemu-img" and "/usr/local/bin/qemu-img".
bool is_called(std::string_view argv0, std::string_view name) noexcept;

// `text` as what a message says beyond what qemu-img would; nothing when called as that.
std::string hint(std::string_view text);
// `first`, and `second` as a message of its own on the next line, as qemu-img prints two of them.
std::string two_messages(std::string_view first, std::string_view second);

// "minivmm: text" on standard error, after what standard output still holds.
void print_error(std::string_view text);
// "minivmm: warning: text".
void print_warning(std::string_view text);

}  // namespace minivmm::cli
