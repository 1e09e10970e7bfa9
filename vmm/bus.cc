// SPDX-License-Identifier: Apache-2.0
#include "vmm/bus.h"

#include <errno.h>

#include <algorithm>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::vmm {

void Bus::add(uint64_t base, uint64_t size, std::string_view device_name, BusDevice& device) {
  if (size == 0 || base + (size - 1) < base) {
    throw base::Error(EINVAL, fmt::format("{} bus: {}: range of {} bytes at {:#x} is not possible",
                                          name_, device_name, size, base));
  }
  const uint64_t last = base + (size - 1);
  const auto next = std::find_if(ranges_.begin(), ranges_.end(),
                                 [&](const Range& range) { return range.last >= base; });
  if (next != ranges_.end() && next->base <= last) {
    throw base::Error(
        EBUSY, fmt::format("{} bus: {} at [{:#x}, {:#x}] overlaps {} at [{:#x}, {:#x}]", name_,
                           device_name, base, last, next->name, next->base, next->last));
  }
  ranges_.insert(next, Range{base, last, std::string(device_name), &device});
}

const Bus::Range* Bus::find(uint64_t address, size_t length) const {
  auto after =
      std::upper_bound(ranges_.begin(), ranges_.end(), address,
                       [](uint64_t value, const Range& range) { return value < range.base; });
  if (after == ranges_.begin() || length == 0) return nullptr;
  const Range& range = *std::prev(after);
  // An access that runs over the end belongs to no device.
  if (address > range.last || length - 1 > range.last - address) return nullptr;
  return &range;
}

bool Bus::read(uint64_t address, std::span<std::byte> data) const {
  const Range* range = find(address, data.size());
  if (range == nullptr) return false;
  range->device->read(address - range->base, data);
  return true;
}

bool Bus::write(uint64_t address, std::span<const std::byte> data) const {
  const Range* range = find(address, data.size());
  if (range == nullptr) return false;
  range->device->write(address - range->base, data);
  return true;
}

}  // namespace minivmm::vmm
