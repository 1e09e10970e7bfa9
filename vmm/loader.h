// SPDX-License-Identifier: Apache-2.0
// Puts a kernel, its command line, initrd and boot tables into guest memory and says how to enter
// it. Knows no KVM; the CPU set-up turns a BootState into registers.
//
// A kernel knows ACPI if it is a bzImage (what it holds is compressed; distributions' kernels do),
// or an ELF file in which the signature of the ACPI root occurs; and its command line does not say
// acpi=off.
//
// ELF files with a PVH note are entered by it, other x86-64 ELF files and bzImages by the 64-bit
// Linux boot protocol.
#pragma once

#include <string>

#include <cstddef>
#include <cstdint>
#include <span>

#include "virtio/guest_memory.h"
#include "vmm/image_reader.h"

namespace minivmm::vmm {

enum class BootProtocol { kAuto, kPvh, kLinux64 };

// How a kernel is told of the virtio-mmio devices. Never in both ways: a driver module that knows
// both refuses to be loaded when it meets a device for the second time.
enum class DeviceListing {
  kAuto,         // by ACPI if the kernel knows ACPI
  kAcpi,         // ACPI tables
  kCommandLine,  // virtio_mmio.device=, and an MP table for the interrupt lines
};

enum class EntryMode {
  kProtected32,  // PVH: flat 32-bit segments, no paging, ebx = boot_data
  kLong64,       // Linux: 64-bit, identity-mapped, rsi = boot_data
};

struct BootState {
  EntryMode mode = EntryMode::kProtected32;
  uint64_t entry = 0;
  uint64_t boot_data = 0;  // guest address of start_info or of the zero page
  bool acpi = false;       // the kernel was told of kAcpiAddress: tables must be put there
};

struct LoadRequest {
  const ImageReader* kernel = nullptr;
  const ImageReader* initrd = nullptr;  // may be null
  std::string command_line;
  std::string device_arguments;  // added to it where it lists the devices
  DeviceListing listing = DeviceListing::kAuto;
  uint64_t ram_size = 0;                // as given to Memory
  std::span<const std::byte> rng_seed;  // for kernels that take one; may be empty
  BootProtocol protocol = BootProtocol::kAuto;
};

// Throws base::Error that names the file and says what is wrong with it: EINVAL for a file, ENOMEM
// or EFAULT for RAM that is too small. Guest memory may be half-written then.
BootState load_kernel(const LoadRequest& request, const virtio::GuestMemory& memory);

}  // namespace minivmm::vmm
