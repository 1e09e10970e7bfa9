// SPDX-License-Identifier: Apache-2.0
// The guest physical memory map and the interrupt lines, in one place. Pure constants.
//
//   0x00000500  GDT                         0x00006000  PVH start_info, module list; setup data
//   0x00007000  zero page or PVH memory map  0x00008000  boot stack (grows down from 0x8ff0)
//   0x00009000  page tables                 0x00020000  command line
//   0x000e0000  ACPI tables (reserved)      0x000f0000  MP table (reserved)
//   0x000ffff0  code for a reset (reserved) 0x00100000  kernel
//   ... RAM up to 3 GiB, then from 4 GiB on; devices live in the hole between.
#pragma once

#include <cstdint>

namespace minivmm::vmm {

inline constexpr uint64_t kPageSize = 4096;

inline constexpr uint64_t kGdtAddress = 0x500;
inline constexpr uint64_t kPvhStartInfoAddress = 0x6000;
inline constexpr uint64_t kPvhModuleListAddress = 0x6040;
inline constexpr uint64_t kSetupDataAddress = 0x6100;
inline constexpr uint64_t kPvhMemoryMapAddress = 0x7000;
inline constexpr uint64_t kZeroPageAddress = 0x7000;
inline constexpr uint64_t kBootStackTop = 0x8ff0;
inline constexpr uint64_t kPageTableAddress = 0x9000;
inline constexpr uint64_t kCommandLineAddress = 0x20000;
inline constexpr uint64_t kCommandLineMax = 0x10000;  // bytes, with the terminating zero
inline constexpr uint64_t kLowRamEnd = 0xa0000;
inline constexpr uint64_t kFirmwareTableAddress = 0xe0000;
inline constexpr uint64_t kAcpiAddress = 0xe0000;
inline constexpr uint64_t kMpTableAddress = 0xf0000;
inline constexpr uint64_t kResetVectorAddress = 0xffff0;  // where real-mode code jumps for a reset
inline constexpr uint64_t kKernelAddress = 0x100000;

// RAM is [0, kHoleStart) and then [kHoleEnd, ...).
inline constexpr uint64_t kHoleStart = 0xc0000000;
inline constexpr uint64_t kHoleEnd = 0x100000000;

inline constexpr uint64_t kVirtioWindowBase = 0xd0000000;
inline constexpr uint64_t kVirtioWindowSize = 0x1000;
inline constexpr uint32_t kVirtioFirstGsi = 5;
inline constexpr uint32_t kIoapicPins = 24;
inline constexpr unsigned kVirtioSlots = kIoapicPins - kVirtioFirstGsi;

inline constexpr int kMaxVcpus = 254;  // APIC ids have 8 bits, and 255 is everybody's

inline constexpr uint64_t kIoapicAddress = 0xfec00000;
inline constexpr uint64_t kLapicAddress = 0xfee00000;
// Used by KVM itself on Intel processors without unrestricted guest mode.
inline constexpr uint64_t kIdentityMapAddress = 0xfffbc000;
inline constexpr uint64_t kTssAddress = 0xfffbd000;

inline constexpr uint32_t kSerialGsi = 4;
inline constexpr uint64_t kSerialPort = 0x3f8;
inline constexpr uint64_t kDebugExitPort = 0xf4;
inline constexpr uint64_t kPowerPort = 0x600;

}  // namespace minivmm::vmm
