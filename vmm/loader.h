// SPDX-License-Identifier: Apache-2.0
// Puts a kernel, its command line, initrd and boot tables into guest memory and says how to enter
// it. Knows no KVM; the CPU set-up turns a BootState into registers.
//
// ELF files with a PVH note are entered by it, other x86-64 ELF files and bzImages by the 64-bit
// Linux boot protocol.
#pragma once

#include <string>

#include <cstdint>

#include "virtio/guest_memory.h"
#include "vmm/image_reader.h"

namespace minivmm::vmm {

enum class BootProtocol { kAuto, kPvh, kLinux64 };

enum class EntryMode {
  kProtected32,  // PVH: flat 32-bit segments, no paging, ebx = boot_data
  kLong64,       // Linux: 64-bit, identity-mapped, rsi = boot_data
};

struct BootState {
  EntryMode mode = EntryMode::kProtected32;
  uint64_t entry = 0;
  uint64_t boot_data = 0;  // guest address of start_info or of the zero page
};

struct LoadRequest {
  const ImageReader* kernel = nullptr;
  const ImageReader* initrd = nullptr;  // may be null
  std::string command_line;
  uint64_t ram_size = 0;      // as given to Memory
  uint64_t rsdp_address = 0;  // ACPI root, 0 if there is none
  BootProtocol protocol = BootProtocol::kAuto;
};

// Throws base::Error that names the file and says what is wrong with it: EINVAL for a file, ENOMEM
// or EFAULT for RAM that is too small. Guest memory may be half-written then.
BootState load_kernel(const LoadRequest& request, const virtio::GuestMemory& memory);

}  // namespace minivmm::vmm
