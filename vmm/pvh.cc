// SPDX-License-Identifier: Apache-2.0
#include "vmm/pvh.h"

#include <algorithm>

#include "base/bytes.h"

namespace minivmm::vmm {

using base::store_le;

void fill_pvh_start_info(std::span<std::byte> out, const PvhInput& input) {
  std::fill(out.begin(), out.end(), std::byte{0});
  const bool has_module = input.initrd_size != 0;
  store_le<uint32_t>(&out[0], kPvhMagic);
  store_le<uint32_t>(&out[4], 1);
  store_le<uint32_t>(&out[12], has_module ? 1 : 0);
  store_le<uint64_t>(&out[16], has_module ? input.module_list_address : 0);
  store_le<uint64_t>(&out[24], input.command_line_address);
  store_le<uint64_t>(&out[32], input.rsdp_address);
  store_le<uint64_t>(&out[40], input.memory_map_address);
  store_le<uint32_t>(&out[48], input.memory_map_entries);
}

void fill_pvh_module(std::span<std::byte> out, const PvhInput& input) {
  std::fill(out.begin(), out.end(), std::byte{0});
  store_le<uint64_t>(&out[0], input.initrd_address);
  store_le<uint64_t>(&out[8], input.initrd_size);
}

void fill_pvh_memory_map(std::span<std::byte> out, std::span<const MemoryMapEntry> map) {
  std::fill(out.begin(), out.end(), std::byte{0});
  size_t at = 0;
  for (const auto& entry : map) {
    store_le<uint64_t>(&out[at], entry.address);
    store_le<uint64_t>(&out[at + 8], entry.size);
    store_le<uint32_t>(&out[at + 16], static_cast<uint32_t>(entry.kind));
    at += kPvhMapEntryBytes;
  }
}

}  // namespace minivmm::vmm
