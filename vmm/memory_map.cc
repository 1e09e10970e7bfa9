// SPDX-License-Identifier: Apache-2.0
#include "vmm/memory_map.h"

#include <algorithm>

#include "vmm/layout.h"

namespace minivmm::vmm {

uint64_t low_ram_end(uint64_t ram_size) { return std::min(ram_size, kHoleStart); }

std::vector<MemoryMapEntry> make_memory_map(uint64_t ram_size) {
  const uint64_t low_end = low_ram_end(ram_size);
  std::vector<MemoryMapEntry> map;
  map.push_back({0, kLowRamEnd, MemoryKind::kRam});
  // Firmware tables: kept out of the allocator's hands.
  map.push_back(
      {kFirmwareTableAddress, kKernelAddress - kFirmwareTableAddress, MemoryKind::kReserved});
  map.push_back({kKernelAddress, low_end - kKernelAddress, MemoryKind::kRam});
  if (ram_size > low_end) map.push_back({kHoleEnd, ram_size - low_end, MemoryKind::kRam});
  return map;
}

}  // namespace minivmm::vmm
