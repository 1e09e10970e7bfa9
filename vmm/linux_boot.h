// SPDX-License-Identifier: Apache-2.0
// What the 64-bit Linux boot protocol wants in memory: zero page, descriptor table, page tables.
// Pure: values in, bytes out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "vmm/memory_map.h"

namespace minivmm::vmm {

struct ZeroPageInput {
  std::span<const std::byte> setup_header;  // from a bzImage; empty for a vmlinux
  uint64_t command_line_address = 0;
  uint64_t initrd_address = 0;
  uint64_t initrd_size = 0;
  uint64_t rsdp_address = 0;        // 0: the kernel looks for it
  uint64_t setup_data_address = 0;  // first of a list; 0: none
  std::span<const MemoryMapEntry> memory_map;
};

// `page` is 4096 bytes. Throws base::Error(EINVAL) for a header or map that does not fit.
void fill_zero_page(std::span<std::byte> page, const ZeroPageInput& input);

// A list of one setup_data entry that gives the kernel (6.0 and later) a seed for its random number
// generator; the kernel wipes it. `out` is kSetupDataHeaderBytes longer than `seed`.
inline constexpr size_t kSetupDataHeaderBytes = 16;
void fill_rng_seed(std::span<std::byte> out, std::span<const std::byte> seed);

// Flat 64-bit segments where the protocol document puts them.
inline constexpr uint16_t kLinuxCodeSelector = 0x10;
inline constexpr uint16_t kLinuxDataSelector = 0x18;
inline constexpr uint16_t kLinuxTssSelector = 0x20;
inline constexpr size_t kLinuxGdtBytes = 5 * 8;
void fill_linux_gdt(std::span<std::byte> gdt);

// PML4, PDPT and four PDs that map the first 4 GiB onto themselves with 2 MiB pages. `tables` is
// kIdentityTableBytes long and will lie at the guest address `address`.
inline constexpr size_t kIdentityTableBytes = 6 * 4096;
void fill_identity_tables(std::span<std::byte> tables, uint64_t address);

// Where an initrd goes: page-aligned, as high as possible, at or below `address_max` (its last
// byte), and not below `floor`. Throws base::Error(ENOMEM) where it does not fit.
uint64_t place_initrd(uint64_t size, uint64_t floor, uint64_t ram_end, uint64_t address_max);

}  // namespace minivmm::vmm
