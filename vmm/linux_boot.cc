// SPDX-License-Identifier: Apache-2.0
#include "vmm/linux_boot.h"

#include <errno.h>

#include <algorithm>
#include <cstring>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/checked.h"
#include "base/error.h"
#include "vmm/bzimage.h"
#include "vmm/layout.h"

namespace minivmm::vmm {
namespace {

using base::store_le;

constexpr size_t kE820Offset = 0x2d0;
constexpr size_t kE820EntryBytes = 20;
constexpr size_t kE820Max = 128;

// What a vmlinux has no header for but the kernel reads all the same.
void synthesize_setup_header(std::span<std::byte> page) {
  store_le<uint16_t>(&page[0x1fe], 0xaa55);
  std::memcpy(&page[0x202], "HdrS", 4);
  store_le<uint16_t>(&page[0x206], 0x20f);
  store_le<uint8_t>(&page[0x211], 1);            // loaded high
  store_le<uint32_t>(&page[0x22c], 0x7fffffff);  // initrd_addr_max
  store_le<uint32_t>(&page[0x230], 0x1000000);   // kernel_alignment
  store_le<uint32_t>(&page[0x238], 2047);        // cmdline_size
}

void store_split(std::span<std::byte> page, size_t low, size_t high, uint64_t value) {
  store_le(&page[low], static_cast<uint32_t>(value));
  store_le(&page[high], static_cast<uint32_t>(value >> 32));
}

}  // namespace

void fill_zero_page(std::span<std::byte> page, const ZeroPageInput& input) {
  std::fill(page.begin(), page.end(), std::byte{0});
  if (input.setup_header.empty()) {
    synthesize_setup_header(page);
  } else if (kSetupHeaderOffset + input.setup_header.size() > kE820Offset) {
    throw base::Error(EINVAL,
                      fmt::format("Linux setup header of {} bytes does not fit the zero page",
                                  input.setup_header.size()));
  } else {
    std::copy(input.setup_header.begin(), input.setup_header.end(),
              page.begin() + kSetupHeaderOffset);
  }
  if (input.memory_map.size() > kE820Max) {
    throw base::Error(EINVAL, "memory map of more than 128 ranges does not fit the zero page");
  }
  store_le<uint64_t>(&page[0x70], input.rsdp_address);
  store_le<uint8_t>(&page[0x210], 0xff);  // type_of_loader: none of the registered ones
  store_split(page, 0x228, 0xc8, input.command_line_address);
  store_split(page, 0x218, 0xc0, input.initrd_address);
  store_split(page, 0x21c, 0xc4, input.initrd_size);
  store_le<uint64_t>(&page[0x250], input.setup_data_address);
  store_le(&page[0x1e8], static_cast<uint8_t>(input.memory_map.size()));
  size_t at = kE820Offset;
  for (const auto& entry : input.memory_map) {
    store_le<uint64_t>(&page[at], entry.address);
    store_le<uint64_t>(&page[at + 8], entry.size);
    store_le<uint32_t>(&page[at + 16], static_cast<uint32_t>(entry.kind));
    at += kE820EntryBytes;
  }
}

void fill_rng_seed(std::span<std::byte> out, std::span<const std::byte> seed) {
  constexpr uint32_t kSetupRngSeed = 9;
  store_le<uint64_t>(&out[0], 0);  // next
  store_le<uint32_t>(&out[8], kSetupRngSeed);
  store_le(&out[12], static_cast<uint32_t>(seed.size()));
  std::copy(seed.begin(), seed.end(), out.begin() + kSetupDataHeaderBytes);
}

void fill_linux_gdt(std::span<std::byte> gdt) {
  constexpr uint64_t kEntries[] = {0, 0, 0x00af9b000000ffff, 0x00cf93000000ffff,
                                   0x008f8b000000ffff};
  static_assert(sizeof kEntries == kLinuxGdtBytes);
  size_t at = 0;
  for (const uint64_t entry : kEntries) {
    store_le<uint64_t>(&gdt[at], entry);
    at += 8;
  }
}

void fill_identity_tables(std::span<std::byte> tables, uint64_t address) {
  constexpr uint64_t kPresentWritable = 3;
  constexpr uint64_t kLargePage = 0x80;
  std::fill(tables.begin(), tables.begin() + 2 * kPageSize, std::byte{0});
  store_le<uint64_t>(&tables[0], (address + kPageSize) | kPresentWritable);
  for (uint64_t i = 0; i < 4; ++i) {
    store_le<uint64_t>(&tables[kPageSize + i * 8],
                       (address + (2 + i) * kPageSize) | kPresentWritable);
  }
  for (uint64_t i = 0; i < 4 * 512; ++i) {
    store_le<uint64_t>(&tables[2 * kPageSize + i * 8], (i << 21) | kPresentWritable | kLargePage);
  }
}

uint64_t place_initrd(uint64_t size, uint64_t floor, uint64_t ram_end, uint64_t address_max) {
  const uint64_t end = std::min(ram_end, address_max + 1);
  const uint64_t first = base::align_up(floor, kPageSize);
  if (first > end || size > end - first) {
    throw base::Error(ENOMEM,
                      fmt::format("initrd of {} bytes does not fit between the kernel's end "
                                  "{:#x} and {:#x}; give the guest more memory",
                                  size, floor, end));
  }
  return base::align_down(end - size, kPageSize);
}

}  // namespace minivmm::vmm
