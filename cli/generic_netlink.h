// SPDX-License-Identifier: Apache-2.0
// Requests to a family of the kernel's generic netlink (see the kernel's
// Documentation/userspace-api/netlink). One thread.
#pragma once

#include <string>
#include <string_view>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/unique_fd.h"

namespace minivmm::cli {

using NetlinkBytes = std::vector<std::byte>;

// Attributes in the order in which they are added.
class NetlinkAttributes {
 public:
  void add(uint16_t type, std::span<const std::byte> payload);
  void add_u32(uint16_t type, uint32_t value);
  void add_u64(uint16_t type, uint64_t value);
  void add_text(uint16_t type, const std::string& text);
  void add_nested(uint16_t type, const NetlinkAttributes& inner);
  const NetlinkBytes& bytes() const noexcept { return bytes_; }

 private:
  NetlinkBytes bytes_;
};

// The payload of the first attribute of a type; empty optional: there is none. Whatever the bytes
// are, nothing outside them is looked at.
std::optional<std::span<const std::byte>> find_attribute(std::span<const std::byte> attributes,
                                                         uint16_t type);
// Empty unless the payload has the size.
std::optional<uint32_t> attribute_u32(std::span<const std::byte> attributes, uint16_t type);

class GenericNetlink {
 public:
  struct Message {
    uint8_t command = 0;
    NetlinkBytes attributes;
  };

  // Throws ENOENT where the kernel has no such family.
  explicit GenericNetlink(const char* family);

  // Sends a command and waits for its end. Returns the attributes of the answer, which may be
  // empty. Throws with the kernel's errno value and its words.
  NetlinkBytes request(uint8_t command, const NetlinkAttributes& attributes);

  // Has the messages of a group of the family come to receive(). Throws.
  void join(const char* group);
  // The next message that nobody asked for, or nothing within the time. Throws.
  std::optional<Message> receive(std::chrono::milliseconds limit);

 private:
  void send(uint16_t type, uint8_t command, uint8_t version, const NetlinkAttributes& attributes);
  NetlinkBytes answer();

  base::UniqueFd socket_;
  uint32_t sequence_ = 0;
  uint16_t family_ = 0;
  NetlinkBytes groups_;  // of the family, as the kernel lists them
  std::vector<Message> unasked_;
};

}  // namespace minivmm::cli
