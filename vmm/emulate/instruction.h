// SPDX-License-Identifier: Apache-2.0
// Takes apart the instructions that KVM's own emulator lacks (execute.h does them). 64-bit code
// only. Pure: bytes in, fields out. What is not in the list of execute.h, or is cut off, is not
// decoded.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace minivmm::vmm::emulate {

enum class Map : uint8_t { kOneByte, k0f, k0f38, k0f3a };
// The prefix that selects between instructions of one opcode.
enum class Selector : uint8_t { kNone, k66, kF3, kF2 };
enum class Segment : uint8_t { kFlat, kFs, kGs };

inline constexpr uint8_t kNoRegister = 0xff;

struct Instruction {
  uint8_t length = 0;  // bytes, all prefixes included
  Map map = Map::kOneByte;
  uint8_t opcode = 0;
  Selector selector = Selector::kNone;
  bool operand16 = false;  // 66 was there, whatever it means
  bool wide = false;       // REX.W or VEX.W
  bool vex = false;
  bool has_rex = false;
  bool lock = false;
  uint8_t vvvv = 0;  // VEX: the register named there

  bool has_modrm = false;
  uint8_t modrm = 0;  // as it stands
  uint8_t reg = 0;    // register numbers, with their extension bits
  uint8_t rm = 0;

  bool memory = false;
  uint8_t base = kNoRegister;
  uint8_t index = kNoRegister;
  uint8_t scale = 0;  // log 2
  bool rip_relative = false;
  bool address32 = false;
  Segment segment = Segment::kFlat;
  int32_t displacement = 0;
  uint8_t immediate = 0;

  // The three bits of ModRM that extend the opcode.
  uint8_t digit() const noexcept { return (modrm >> 3) & 7; }
};

std::optional<Instruction> decode(std::span<const uint8_t> bytes);

}  // namespace minivmm::vmm::emulate
