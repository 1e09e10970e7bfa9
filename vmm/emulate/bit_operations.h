// SPDX-License-Identifier: Apache-2.0
// The arithmetic among the instructions that execute.h does. Pure: operands and flags in, results
// and flags out.
#pragma once

#include <cstdint>

#include "vmm/emulate/instruction.h"

namespace minivmm::vmm::emulate {

constexpr uint64_t mask_of(unsigned bits) {
  return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
}

struct BitOperation {
  unsigned bits = 32;         // 16, 32 or 64
  unsigned source_bits = 32;  // as bits; 8 for one form of crc32
  uint64_t source = 0;        // what ModRM.rm names, cut to source_bits
  uint64_t destination = 0;   // what ModRM.reg names
  uint64_t second = 0;        // what VEX.vvvv names
  uint64_t rdx = 0;
  uint64_t flags = 0;
  // Which of them have results; bits above `bits` in those mean nothing. Where both name one
  // register, the destination's is the one that stays.
  bool destination_written = false;
  bool second_written = false;
};

// False if the instruction is none of these; nothing is changed then.
bool perform(const Instruction& instruction, BitOperation& operation);

}  // namespace minivmm::vmm::emulate
