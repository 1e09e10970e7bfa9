// SPDX-License-Identifier: Apache-2.0
// What a user of a node does with it, and what it lets the node's other users do. Conflicts are
// found when a user attaches, and name both.
#pragma once

#include <string>

#include <cstdint>

namespace minivmm::block {

struct Permissions {
  enum : uint8_t {
    kWrite = 1,   // changes content
    kResize = 2,  // changes the size
    // Changes the size by command, while others use it, who are told (Node::ContentWatcher).
    kResizeInUse = 4,
  };
  uint8_t uses = 0;
  uint8_t shares = 0;  // what others may do; needing stable data is sharing nothing

  bool can_write() const noexcept { return (uses & kWrite) != 0; }
  bool can_resize() const noexcept { return (uses & (kResize | kResizeInUse)) != 0; }

  // A front end: others may write too, nobody but the control plane resizes.
  static constexpr Permissions front_end(bool writable) noexcept {
    return {writable ? uint8_t{kWrite} : uint8_t{0}, kWrite | kResizeInUse};
  }
  // The control plane while it resizes a disk.
  static constexpr Permissions resizer() noexcept { return {kResizeInUse, kWrite | kResizeInUse}; }
  // Looks after it and lets everybody do everything.
  static constexpr Permissions observer() noexcept { return {0, kWrite | kResize | kResizeInUse}; }
  // A backing file: its content must not change.
  static constexpr Permissions backing() noexcept { return {0, 0}; }
  // The file under a format or a filter: theirs alone. What stands above them may need that nobody
  // else changes it (a backing file does).
  static constexpr Permissions format_file(bool writable) noexcept {
    return {writable ? uint8_t{kWrite | kResize} : uint8_t{0}, 0};
  }
};

// "write", "resize", "write and resize", "read".
std::string permission_words(uint8_t bits);

}  // namespace minivmm::block
