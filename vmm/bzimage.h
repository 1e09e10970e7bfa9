// SPDX-License-Identifier: Apache-2.0
// Reads the setup header of a Linux bzImage (Documentation/arch/x86/boot.rst). Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vmm/image_reader.h"

namespace minivmm::vmm {

struct BzImage {
  std::vector<std::byte> setup_header;  // file bytes [0x1f1, end of header), for the zero page
  uint64_t payload_offset = 0;          // in the file
  uint64_t payload_size = 0;            // bytes to load
  uint64_t preferred_address = 0;       // where the kernel moves itself to
  uint64_t init_size = 0;               // memory it needs there
  uint32_t command_line_max = 0;        // bytes without the terminating zero
  uint32_t initrd_address_max = 0;      // highest byte an initrd may use
};

// Offset of the setup header in the file and in the zero page.
inline constexpr uint64_t kSetupHeaderOffset = 0x1f1;
// The 64-bit entry lies here behind the load address.
inline constexpr uint64_t kLinux64EntryOffset = 0x200;

bool looks_like_bzimage(const ImageReader& image);
// Throws base::Error(EINVAL) that says what is wrong or too old about the file.
BzImage parse_bzimage(const ImageReader& image);

}  // namespace minivmm::vmm
