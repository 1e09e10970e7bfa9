// SPDX-License-Identifier: Apache-2.0
// The ACPI tables of a machine: RSDP, XSDT, hardware-reduced FADT, MADT and a DSDT with the serial
// port and the virtio-mmio devices. Stock kernels find their disks by nothing else. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace minivmm::vmm {

struct AcpiDevice {
  uint64_t base;  // of a window below 4 GiB
  uint64_t size;
  uint32_t gsi;
};

struct AcpiInput {
  unsigned vcpus = 1;  // APIC ids 0 to vcpus - 1
  // virtio-mmio devices; Linux names them in this order.
  std::span<const AcpiDevice> devices;
};

// All tables as they lie from the guest address `address` (16-byte aligned, below 4 GiB) on, the
// RSDP first. Throws base::Error(EINVAL) for a window that lies above 4 GiB.
std::vector<std::byte> make_acpi_tables(const AcpiInput& input, uint64_t address);

}  // namespace minivmm::vmm
