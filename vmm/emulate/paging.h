// SPDX-License-Identifier: Apache-2.0
// A guest's memory by its own linear addresses: walks its page tables as the processor would, sets
// their accessed and dirty bits, and reports page faults. 64-bit mode only. Used on the vCPU's own
// thread while the vCPU stands still; other vCPUs may change tables and memory meanwhile.
#pragma once

#include <linux/kvm.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "virtio/guest_memory.h"

namespace minivmm::vmm::emulate {

// What stops an instruction.
struct Exception {
  uint8_t vector = 0;
  std::optional<uint32_t> error_code;
  uint64_t address = 0;  // of a page fault
};

inline constexpr uint8_t kDebugVector = 1;
inline constexpr uint8_t kBreakpointVector = 3;
inline constexpr uint8_t kInvalidOpcodeVector = 6;
inline constexpr uint8_t kNoDeviceVector = 7;
inline constexpr uint8_t kProtectionVector = 13;
inline constexpr uint8_t kPageFaultVector = 14;
inline constexpr uint8_t kFloatingPointVector = 16;

// Memory that no table leads to RAM: a device, or nothing. The instruction cannot be done here.
struct NotRam {};

class Paging {
 public:
  // The registers as the vCPU has them. All outlive this.
  Paging(const virtio::GuestMemory& memory, const kvm_sregs& sregs, const kvm_regs& regs)
      : memory_(memory), sregs_(sregs), regs_(regs) {}

  // Throw Exception for a page fault, NotRam. What was written before a fault stays.
  void read(uint64_t address, std::span<std::byte> out) const;
  void write(uint64_t address, std::span<const std::byte> data) const;
  // As the processor itself reads its descriptor tables, whatever the privilege level.
  void read_as_system(uint64_t address, std::span<std::byte> out) const;
  // The host's address of `length` bytes, which lie in one page, for reading and writing.
  std::byte* writable(uint64_t address, size_t length) const;

 private:
  enum class Access { kRead, kWrite, kSystemRead };
  std::byte* translate(uint64_t address, size_t length, Access access) const;
  [[noreturn]] void fault(uint64_t address, Access access, bool present) const;
  bool allowed(uint64_t rights, Access access) const;
  bool user() const noexcept { return sregs_.ss.dpl == 3; }

  const virtio::GuestMemory& memory_;
  const kvm_sregs& sregs_;
  const kvm_regs& regs_;
};

}  // namespace minivmm::vmm::emulate
