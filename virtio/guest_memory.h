// SPDX-License-Identifier: Apache-2.0
// A view of guest RAM by guest physical address. Does not own the memory: the machine (or a test)
// keeps every region mapped until the devices that use the view are gone. Immutable after
// construction, so any thread may translate at once.
//
// Guest memory is hostile: the guest may change any byte at any time. Whoever reads a structure
// from it copies it once and checks the copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace minivmm::virtio {

struct MemoryRegion {
  uint64_t guest_base;  // guest physical address of the first byte
  uint64_t size;        // bytes
  std::byte* host;      // where it is mapped here
};

class GuestMemory {
 public:
  GuestMemory() = default;
  // Regions must not overlap or wrap; they are sorted here. Throws base::Error(EINVAL).
  explicit GuestMemory(std::vector<MemoryRegion> regions);

  // Host address of the guest range [address, address + length), or nullptr where any byte of it
  // lies outside one region. A length of 0 is never valid.
  std::byte* at(uint64_t address, uint64_t length) const noexcept;

  const std::vector<MemoryRegion>& regions() const noexcept { return regions_; }

 private:
  std::vector<MemoryRegion> regions_;
};

}  // namespace minivmm::virtio
