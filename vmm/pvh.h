// SPDX-License-Identifier: Apache-2.0
// The PVH start_info structure (Xen's public/arch-x86/hvm/start_info.h) that a guest entered
// through its Xen ELF note finds at ebx. Pure: values in, bytes out.
//
//   start_info  0 magic, 4 version, 8 flags, 12 nr_modules, 16 modlist, 24 cmdline, 32 rsdp,
//               40 memmap, 48 memmap_entries, 52 reserved
//   modlist     0 address, 8 size, 16 cmdline, 24 reserved
//   memmap      0 address, 8 size, 16 type, 20 reserved
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "vmm/memory_map.h"

namespace minivmm::vmm {

inline constexpr uint32_t kPvhMagic = 0x336ec578;
inline constexpr size_t kPvhStartInfoBytes = 56;
inline constexpr size_t kPvhModuleBytes = 32;
inline constexpr size_t kPvhMapEntryBytes = 24;

struct PvhInput {
  uint64_t command_line_address = 0;
  uint64_t initrd_address = 0;
  uint64_t initrd_size = 0;  // 0: no module
  uint64_t module_list_address = 0;
  uint64_t rsdp_address = 0;
  uint64_t memory_map_address = 0;
  uint32_t memory_map_entries = 0;
};

// Sizes: kPvhStartInfoBytes, kPvhModuleBytes, map.size() * kPvhMapEntryBytes.
void fill_pvh_start_info(std::span<std::byte> out, const PvhInput& input);
void fill_pvh_module(std::span<std::byte> out, const PvhInput& input);
void fill_pvh_memory_map(std::span<std::byte> out, std::span<const MemoryMapEntry> map);

}  // namespace minivmm::vmm
