// SPDX-License-Identifier: Apache-2.0
// The Intel MultiProcessor tables (version 1.4): processors, IOAPIC and its lines, for kernels
// without ACPI. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace minivmm::vmm {

// Floating pointer and configuration table as they lie from `address` (16-byte aligned) on. A
// kernel looks for the pointer at 16-byte steps between 0xf0000 and 0x100000.
std::vector<std::byte> make_mp_table(unsigned vcpus, uint64_t address);

}  // namespace minivmm::vmm
