// SPDX-License-Identifier: Apache-2.0
// The memory map as guests are told it (e820 and PVH use the same numbers). Pure.
#pragma once

#include <cstdint>
#include <vector>

namespace minivmm::vmm {

enum class MemoryKind : uint32_t { kRam = 1, kReserved = 2 };

struct MemoryMapEntry {
  uint64_t address;
  uint64_t size;
  MemoryKind kind;
};

// `ram_size` as given to Memory: RAM below the hole first, the rest above it.
std::vector<MemoryMapEntry> make_memory_map(uint64_t ram_size);

// One past the last byte of RAM below the hole.
uint64_t low_ram_end(uint64_t ram_size);

}  // namespace minivmm::vmm
