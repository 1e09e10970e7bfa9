// SPDX-License-Identifier: Apache-2.0
// Does the instructions that KVM's instruction emulator lacks, for hosts whose KVM has no hardware
// virtualization and runs a guest's kernel through it:
//
//   int3 icebp ud1              the exception that they raise
//   fwait fnclex fnstcw fldcw fnstsw emms ldmxcsr stmxcsr
//   popcnt crc32 andn bextr blsi blsmsk blsr bzhi mulx pdep pext rorx sarx shlx shrx adcx adox
//   cmpxchg16b clzero clwb clac stac monitor mwait
//   verr verw lar lsl
//
// Knows no KVM calls: state in, changed state out. 64-bit code only.
#pragma once

#include <linux/kvm.h>

#include <cstdint>
#include <optional>
#include <span>

#include "virtio/guest_memory.h"
#include "vmm/emulate/paging.h"

namespace minivmm::vmm::emulate {

// The x87 and SSE state, fetched only by instructions that need it.
class FloatingPoint {
 public:
  virtual ~FloatingPoint() = default;
  virtual kvm_fpu load() = 0;
  virtual void store(const kvm_fpu& state) = 0;
};

enum class Outcome {
  kDone,       // rip is behind the instruction
  kException,  // to be raised; rip is where the exception's handler shall find it
  kUnknown,    // nothing was changed
};

// A vCPU that stands at an instruction.
struct Cpu {
  kvm_regs regs{};
  kvm_sregs sregs{};
  FloatingPoint& floating_point;
  const virtio::GuestMemory& memory;
};

// `bytes` begin with the instruction at cpu.regs.rip and may go on behind it. With kException,
// `exception` says which. Registers change only for kDone and for the rip of a trap.
Outcome execute(Cpu& cpu, std::span<const uint8_t> bytes, Exception& exception);

}  // namespace minivmm::vmm::emulate
