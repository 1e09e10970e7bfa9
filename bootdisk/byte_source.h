// SPDX-License-Identifier: Apache-2.0
// The bytes of a disk, as those who look for a kernel on it see them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace minivmm::bootdisk {

class ByteSource {
 public:
  ByteSource() = default;
  ByteSource(const ByteSource&) = delete;
  ByteSource& operator=(const ByteSource&) = delete;
  virtual ~ByteSource() = default;

  virtual uint64_t size() const noexcept = 0;
  // Fills `out`. Throws base::Error: EINVAL past the end, or what reading met.
  virtual void read(uint64_t offset, std::span<std::byte> out) = 0;
};

}  // namespace minivmm::bootdisk
