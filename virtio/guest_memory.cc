// SPDX-License-Identifier: Apache-2.0
#include "virtio/guest_memory.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/checked.h"
#include "base/error.h"

namespace minivmm::virtio {

GuestMemory::GuestMemory(std::vector<MemoryRegion> regions) : regions_(std::move(regions)) {
  std::sort(regions_.begin(), regions_.end(), [](const MemoryRegion& a, const MemoryRegion& b) {
    return a.guest_base < b.guest_base;
  });
  uint64_t free_from = 0;
  for (const MemoryRegion& region : regions_) {
    const auto end = base::checked_add(region.guest_base, region.size);
    if (region.size == 0 || region.host == nullptr || !end || region.guest_base < free_from) {
      throw base::Error(EINVAL, "guest memory: regions are empty, overlap or wrap");
    }
    free_from = *end;
  }
}

std::byte* GuestMemory::at(uint64_t address, uint64_t length) const noexcept {
  if (length == 0) return nullptr;
  // One or two regions: a linear scan is the fastest search.
  for (const MemoryRegion& region : regions_) {
    if (address >= region.guest_base &&
        base::range_fits(address - region.guest_base, length, region.size)) {
      return region.host + (address - region.guest_base);
    }
  }
  return nullptr;
}

}  // namespace minivmm::virtio
