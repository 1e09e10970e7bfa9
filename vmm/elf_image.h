// SPDX-License-Identifier: Apache-2.0
// Reads the headers of a 64-bit ELF kernel: what to load where, and where to enter. Pure: no guest
// memory is touched.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "vmm/image_reader.h"

namespace minivmm::vmm {

struct ElfSegment {
  uint64_t file_offset;
  uint64_t file_size;
  uint64_t address;      // guest physical
  uint64_t memory_size;  // >= file_size; the rest is zero
};

struct ElfImage {
  std::vector<ElfSegment> segments;   // sorted by address, not overlapping, none empty
  uint64_t entry = 0;                 // e_entry; guest physical
  std::optional<uint32_t> pvh_entry;  // from the Xen note, 32-bit entry
  uint64_t lowest = 0;                // first byte used
  uint64_t end = 0;                   // one past the last
};

bool looks_like_elf(const ImageReader& image);
// Throws base::Error(EINVAL) that says what is wrong with the file.
ElfImage parse_elf(const ImageReader& image);

}  // namespace minivmm::vmm
