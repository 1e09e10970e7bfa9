// SPDX-License-Identifier: Apache-2.0
#include "vmm/emulate/instruction.h"

namespace minivmm::vmm::emulate {
namespace {

struct CutOff {};

class Decoder {
 public:
  explicit Decoder(std::span<const uint8_t> bytes) : bytes_(bytes) {}

  std::optional<Instruction> run() {
    prefixes();
    if (!opcode() || !known()) return std::nullopt;
    if (out_.has_modrm) modrm();
    if (out_.map == Map::k0f3a) out_.immediate = next();
    out_.length = static_cast<uint8_t>(at_);
    return out_;
  }

 private:
  uint8_t next() {
    if (at_ == bytes_.size() || at_ == kLongest) throw CutOff{};
    return bytes_[at_++];
  }

  void prefixes() {
    for (;; ++at_) {
      switch (at_ < bytes_.size() ? bytes_[at_] : 0) {
        case 0x66:
          out_.operand16 = true;
          if (out_.selector == Selector::kNone) out_.selector = Selector::k66;
          continue;
        case 0xf2:
          out_.selector = Selector::kF2;
          continue;
        case 0xf3:
          out_.selector = Selector::kF3;
          continue;
        case 0x67:
          out_.address32 = true;
          continue;
        case 0x64:
          out_.segment = Segment::kFs;
          continue;
        case 0x65:
          out_.segment = Segment::kGs;
          continue;
        case 0xf0:
          out_.lock = true;
          continue;
        case 0x26:
        case 0x2e:
        case 0x36:
        case 0x3e:  // mean nothing in 64-bit code
          continue;
        default:
          return;
      }
    }
  }

  bool opcode() {
    uint8_t byte = next();
    if (byte == 0xc4 || byte == 0xc5) return vex(byte);
    if ((byte & 0xf0) == 0x40) {
      out_.has_rex = true;
      rex(byte);
      byte = next();
    }
    if (byte != 0x0f) {
      out_.opcode = byte;
      return true;
    }
    out_.map = Map::k0f;
    byte = next();
    if (byte == 0x38 || byte == 0x3a) {
      out_.map = byte == 0x38 ? Map::k0f38 : Map::k0f3a;
      byte = next();
    }
    out_.opcode = byte;
    return true;
  }

  void rex(uint8_t byte) {
    out_.wide = (byte & 8) != 0;
    reg_high_ = (byte & 4) != 0 ? 8 : 0;
    index_high_ = (byte & 2) != 0 ? 8 : 0;
    base_high_ = (byte & 1) != 0 ? 8 : 0;
  }

  // Its bits are those of REX, inverted, then map, width, a register and the selecting prefix.
  bool vex(uint8_t first) {
    if (out_.selector != Selector::kNone || out_.lock) return false;
    out_.vex = true;
    uint8_t byte = next();
    reg_high_ = (byte & 0x80) == 0 ? 8 : 0;
    uint8_t map = 1;
    if (first == 0xc4) {
      index_high_ = (byte & 0x40) == 0 ? 8 : 0;
      base_high_ = (byte & 0x20) == 0 ? 8 : 0;
      map = byte & 0x1f;
      byte = next();
      out_.wide = (byte & 0x80) != 0;
    }
    if (map < 1 || map > 3 || (byte & 4) != 0) return false;  // all ours are of one width
    out_.map = static_cast<Map>(map);
    out_.vvvv = static_cast<uint8_t>(~(byte >> 3) & 0xf);
    out_.selector = static_cast<Selector>(byte & 3);
    out_.opcode = next();
    return true;
  }

  // Whether the opcode is one of ours, and has a ModRM byte.
  bool known() {
    out_.has_modrm = true;
    switch (out_.map) {
      case Map::kOneByte:
        return one_byte();
      case Map::k0f:
        return !out_.vex && two_bytes();
      case Map::k0f38:
        return out_.vex ? out_.opcode == 0xf2 || out_.opcode == 0xf3 || out_.opcode == 0xf5 ||
                              out_.opcode == 0xf6 || out_.opcode == 0xf7
                        : out_.opcode == 0xf0 || out_.opcode == 0xf1 || out_.opcode == 0xf6;
      default:
        return out_.vex && out_.opcode == 0xf0;
    }
  }

  bool one_byte() {
    switch (out_.opcode) {
      case 0x9b:  // fwait
      case 0xcc:  // int3
      case 0xf1:  // icebp
        out_.has_modrm = false;
        return true;
      case 0xd9:  // fldcw, fnstcw
      case 0xdb:  // fnclex
      case 0xdd:  // fnstsw m16
      case 0xdf:  // fnstsw ax
        return true;
      default:
        return false;
    }
  }

  bool two_bytes() {
    switch (out_.opcode) {
      case 0x77:  // emms
        out_.has_modrm = false;
        return true;
      case 0x00:  // verr, verw
      case 0x01:  // clac, stac, clzero, monitor, mwait
      case 0x02:  // lar
      case 0x03:  // lsl
      case 0xae:  // ldmxcsr, stmxcsr, clwb
      case 0xb8:  // popcnt
      case 0xb9:  // ud1
      case 0xc7:  // cmpxchg16b
        return true;
      default:
        return false;
    }
  }

  void modrm() {
    out_.modrm = next();
    const uint8_t mod = out_.modrm >> 6;
    const uint8_t rm = out_.modrm & 7;
    out_.reg = static_cast<uint8_t>(((out_.modrm >> 3) & 7) | reg_high_);
    out_.rm = static_cast<uint8_t>(rm | base_high_);
    if (mod == 3) return;
    out_.memory = true;
    uint8_t displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    if (rm == 4) {
      const uint8_t sib = next();
      out_.scale = sib >> 6;
      const auto index = static_cast<uint8_t>(((sib >> 3) & 7) | index_high_);
      if (index != 4) out_.index = index;
      out_.base = static_cast<uint8_t>((sib & 7) | base_high_);
      if ((sib & 7) == 5 && mod == 0) {
        out_.base = kNoRegister;
        displacement_bytes = 4;
      }
    } else if (rm == 5 && mod == 0) {
      out_.rip_relative = true;
      displacement_bytes = 4;
    } else {
      out_.base = out_.rm;
    }
    displacement(displacement_bytes);
  }

  void displacement(uint8_t bytes) {
    if (bytes == 1) {
      out_.displacement = (next() ^ 0x80) - 0x80;  // sign-extended
    } else if (bytes == 4) {
      uint32_t value = 0;
      for (unsigned i = 0; i < 4; ++i) value |= uint32_t{next()} << (8 * i);
      out_.displacement = static_cast<int32_t>(value);
    }
  }

  static constexpr size_t kLongest = 15;

  std::span<const uint8_t> bytes_;
  size_t at_ = 0;
  Instruction out_;
  uint8_t reg_high_ = 0;
  uint8_t index_high_ = 0;
  uint8_t base_high_ = 0;
};

}  // namespace

std::optional<Instruction> decode(std::span<const uint8_t> bytes) {
  try {
    return Decoder(bytes).run();
  } catch (const CutOff&) {
    return std::nullopt;
  }
}

}  // namespace minivmm::vmm::emulate
