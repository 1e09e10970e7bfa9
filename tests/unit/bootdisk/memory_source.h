// SPDX-License-Identifier: Apache-2.0
// A disk in memory for the tests of this folder.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <vector>

#include "base/error.h"
#include "bootdisk/byte_source.h"

namespace minivmm::bootdisk {

class MemorySource final : public ByteSource {
 public:
  explicit MemorySource(size_t size) : bytes(size) {}
  explicit MemorySource(std::vector<std::byte> content) : bytes(std::move(content)) {}

  uint64_t size() const noexcept override { return bytes.size(); }
  void read(uint64_t offset, std::span<std::byte> out) override {
    if (offset > bytes.size() || out.size() > bytes.size() - offset) {
      throw base::Error(EINVAL, "past the end");
    }
    std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(offset), out.size(), out.begin());
  }

  std::vector<std::byte> bytes;
};

}  // namespace minivmm::bootdisk
