// SPDX-License-Identifier: Apache-2.0
#include "vmm/emulate/bit_operations.h"

#include <bit>

namespace minivmm::vmm::emulate {
namespace {

constexpr uint64_t kCf = 1 << 0;
constexpr uint64_t kPf = 1 << 2;
constexpr uint64_t kAf = 1 << 4;
constexpr uint64_t kZf = 1 << 6;
constexpr uint64_t kSf = 1 << 7;
constexpr uint64_t kOf = 1 << 11;

class Operation {
 public:
  Operation(const Instruction& in, BitOperation& op)
      : in_(in),
        op_(op),
        mask_(mask_of(op.bits)),
        source_(op.source & mask_),
        second_(op.second & mask_) {}

  bool run() {
    if (in_.map == Map::k0f) return popcnt();
    if (in_.map == Map::k0f3a) return in_.selector == Selector::kF2 && result(rotated());
    if (!in_.vex) return in_.opcode == 0xf6 ? add_with_carry() : crc32();
    switch (in_.opcode) {
      case 0xf2:
        return in_.selector == Selector::kNone && with_flags(~second_ & source_, false);
      case 0xf3:
        return in_.selector == Selector::kNone && lowest_bit();
      case 0xf5:
        return bits_by_mask();
      case 0xf6:
        return in_.selector == Selector::kF2 && multiply();
      default:
        return shift_or_extract();
    }
  }

 private:
  bool result(uint64_t value) {
    op_.destination = value;
    op_.destination_written = true;
    return true;
  }
  void set_flags(uint64_t mask, uint64_t value) { op_.flags = (op_.flags & ~mask) | value; }
  uint64_t sign_and_zero(uint64_t value) const {
    return ((value & mask_) == 0 ? kZf : 0) | ((value >> (op_.bits - 1) & 1) != 0 ? kSf : 0);
  }
  // Flags of the group: S and Z from the result, C as said, O clear.
  bool with_flags(uint64_t value, bool carry) {
    set_flags(kSf | kZf | kCf | kOf, sign_and_zero(value) | (carry ? kCf : 0));
    return result(value);
  }

  bool popcnt() {
    set_flags(kOf | kSf | kZf | kAf | kCf | kPf, source_ == 0 ? kZf : 0);
    return result(static_cast<uint64_t>(std::popcount(source_)));
  }

  // Castagnoli's polynomial, bit-reversed.
  bool crc32() {
    if (in_.selector != Selector::kF2) return false;
    uint32_t crc = static_cast<uint32_t>(op_.destination);
    for (unsigned i = 0; i < op_.source_bits; i += 8) {
      crc ^= static_cast<uint32_t>(op_.source >> i & 0xff);
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0x82f63b78u : 0u);
    }
    if (op_.bits == 16) op_.bits = 32;  // the destination is never shorter
    return result(crc);
  }

  // adcx goes by the carry flag alone, adox by the overflow flag.
  bool add_with_carry() {
    if (in_.selector != Selector::k66 && in_.selector != Selector::kF3) return false;
    const uint64_t flag = in_.selector == Selector::k66 ? kCf : kOf;
    const unsigned __int128 sum = static_cast<unsigned __int128>(op_.destination & mask_) +
                                  source_ + ((op_.flags & flag) != 0 ? 1u : 0u);
    set_flags(flag, (sum >> op_.bits & 1) != 0 ? flag : 0);
    return result(static_cast<uint64_t>(sum));
  }

  uint64_t rotated() const {
    const unsigned count = in_.immediate & (op_.bits - 1);
    return count == 0 ? source_ : (source_ >> count) | (source_ << (op_.bits - count));
  }

  bool lowest_bit() {
    uint64_t value = 0;
    bool carry = source_ == 0;
    switch (in_.digit()) {
      case 1:  // blsr
        value = source_ & (source_ - 1);
        break;
      case 2:  // blsmsk
        value = source_ ^ (source_ - 1);
        break;
      case 3:  // blsi
        value = source_ & (~source_ + 1);
        carry = !carry;
        break;
      default:
        return false;
    }
    value &= mask_;
    set_flags(kSf | kZf | kCf | kOf, sign_and_zero(value) | (carry ? kCf : 0));
    op_.second = value;
    op_.second_written = true;
    return true;
  }

  bool bits_by_mask() {
    switch (in_.selector) {
      case Selector::kNone: {  // bzhi
        const auto count = static_cast<unsigned>(second_ & 0xff);
        return with_flags(count < op_.bits ? source_ & mask_of(count) : source_, count >= op_.bits);
      }
      case Selector::kF3:
        return result(extract());
      case Selector::kF2:
        return result(deposit());
      default:
        return false;
    }
  }

  uint64_t extract() const {
    uint64_t out = 0;
    unsigned to = 0;
    for (uint64_t mask = source_; mask != 0; mask &= mask - 1) {
      out |= (second_ >> std::countr_zero(mask) & 1) << to++;
    }
    return out;
  }

  uint64_t deposit() const {
    uint64_t out = 0;
    unsigned from = 0;
    for (uint64_t mask = source_; mask != 0; mask &= mask - 1) {
      out |= (second_ >> from++ & 1) << std::countr_zero(mask);
    }
    return out;
  }

  bool multiply() {
    const unsigned __int128 product = static_cast<unsigned __int128>(op_.rdx & mask_) * source_;
    op_.second = static_cast<uint64_t>(product) & mask_;
    op_.second_written = true;
    return result(static_cast<uint64_t>(product >> op_.bits) & mask_);
  }

  bool shift_or_extract() {
    const auto count = static_cast<unsigned>(second_ & (op_.bits - 1));
    switch (in_.selector) {
      case Selector::k66:
        return result(source_ << count);
      case Selector::kF2:
        return result(source_ >> count);
      case Selector::kF3: {
        const unsigned up = 64 - op_.bits;
        return result(static_cast<uint64_t>((static_cast<int64_t>(source_ << up) >> up) >> count));
      }
      default: {  // bextr
        const auto start = static_cast<unsigned>(second_ & 0xff);
        const auto length = static_cast<unsigned>(second_ >> 8 & 0xff);
        uint64_t value = start < op_.bits ? source_ >> start : 0;
        if (length < 64) value &= mask_of(length);
        set_flags(kZf | kCf | kOf, value == 0 ? kZf : 0);
        return result(value);
      }
    }
  }

  const Instruction& in_;
  BitOperation& op_;
  const uint64_t mask_;
  const uint64_t source_;
  const uint64_t second_;
};

}  // namespace

bool perform(const Instruction& instruction, BitOperation& operation) {
  return Operation(instruction, operation).run();
}

}  // namespace minivmm::vmm::emulate
