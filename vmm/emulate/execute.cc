// SPDX-License-Identifier: Apache-2.0
#include "vmm/emulate/execute.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "vmm/emulate/bit_operations.h"
#include "vmm/emulate/instruction.h"

namespace minivmm::vmm::emulate {
namespace {

constexpr uint64_t kZf = 1 << 6;
constexpr uint64_t kAc = 1 << 18;
constexpr uint64_t kCr0Mp = 1 << 1;
constexpr uint64_t kCr0Em = 1 << 2;
constexpr uint64_t kCr0Ts = 1 << 3;
constexpr uint64_t kCr4OsFxsr = 1 << 9;

struct Unknown {};

class Executor {
 public:
  Executor(Cpu& cpu, const Instruction& instruction)
      : cpu_(cpu), in_(instruction), paging_(cpu.memory, cpu.sregs, cpu.regs) {}

  void run() {
    switch (in_.map) {
      case Map::kOneByte:
        return one_byte();
      case Map::k0f:
        return two_bytes();
      default:
        return general();
    }
  }

 private:
  using Reg = decltype(kvm_regs::rax);

  // In the order of their numbers in an instruction.
  Reg& reg(uint8_t number) const {
    kvm_regs& r = cpu_.regs;
    Reg* const all[16] = {&r.rax, &r.rcx, &r.rdx, &r.rbx, &r.rsp, &r.rbp, &r.rsi, &r.rdi,
                          &r.r8,  &r.r9,  &r.r10, &r.r11, &r.r12, &r.r13, &r.r14, &r.r15};
    return *all[number & 15];
  }

  uint64_t address() const {
    uint64_t at = static_cast<uint64_t>(int64_t{in_.displacement});
    if (in_.rip_relative) at += cpu_.regs.rip + in_.length;
    if (in_.base != kNoRegister) at += reg(in_.base);
    if (in_.index != kNoRegister) at += reg(in_.index) << in_.scale;
    if (in_.address32) at &= 0xffffffff;
    return at + segment_base();
  }

  uint64_t segment_base() const {
    if (in_.segment == Segment::kFs) return cpu_.sregs.fs.base;
    return in_.segment == Segment::kGs ? cpu_.sregs.gs.base : 0;
  }

  template <typename T>
  T load(uint64_t at) const {
    T value{};
    paging_.read(at, std::as_writable_bytes(std::span(&value, 1)));
    return value;
  }
  template <typename T>
  void store(uint64_t at, T value) const {
    paging_.write(at, std::as_bytes(std::span(&value, 1)));
  }

  unsigned operand_bits() const {
    // In adcx the prefix selects, it does not shorten.
    const bool adcx = in_.map == Map::k0f38 && in_.opcode == 0xf6;
    return in_.wide ? 64 : in_.operand16 && !in_.vex && !adcx ? 16 : 32;
  }

  // The operand that ModRM names, of `bits`.
  uint64_t source(unsigned bits) const {
    if (in_.memory) {
      const uint64_t at = address();
      return bits == 64   ? load<uint64_t>(at)
             : bits == 32 ? load<uint32_t>(at)
             : bits == 16 ? load<uint16_t>(at)
                          : load<uint8_t>(at);
    }
    // Without REX, the byte registers 4 to 7 are the second bytes of 0 to 3.
    if (bits == 8 && !in_.has_rex && in_.rm >= 4 && in_.rm < 8) {
      return (reg(in_.rm - 4) >> 8) & 0xff;
    }
    return reg(in_.rm) & mask_of(bits);
  }

  // A 32-bit result clears the upper half, a 16-bit one leaves the rest.
  void set(uint8_t number, uint64_t value, unsigned bits) const {
    Reg& to = reg(number);
    to = bits == 16 ? (to & ~uint64_t{0xffff}) | (value & 0xffff) : value & mask_of(bits);
  }

  void flags(uint64_t mask, uint64_t value) const {
    cpu_.regs.rflags = (cpu_.regs.rflags & ~mask) | (value & mask);
  }
  void zero_flag(bool on) const { flags(kZf, on ? kZf : 0); }

  [[noreturn]] void trap(uint8_t vector) const {
    cpu_.regs.rip += in_.length;
    throw Exception{vector, std::nullopt, 0};
  }
  [[noreturn]] static void undefined() { throw Exception{kInvalidOpcodeVector, std::nullopt, 0}; }
  void plain_or_unknown() const {
    if (in_.lock) undefined();
  }

  // --- One byte ---

  void one_byte() const {
    plain_or_unknown();
    switch (in_.opcode) {
      case 0xcc:
        trap(kBreakpointVector);
      case 0xf1:
        trap(kDebugVector);
      case 0x9b:
        return wait();
      default:
        return x87();
    }
  }

  void wait() const {
    if ((cpu_.sregs.cr0 & (kCr0Mp | kCr0Ts)) == (kCr0Mp | kCr0Ts)) {
      throw Exception{kNoDeviceVector, std::nullopt, 0};
    }
    raise_pending(cpu_.floating_point.load());
  }

  static void raise_pending(const kvm_fpu& state) {
    // Unmasked exceptions wait for the next instruction that looks.
    if ((state.fsw & ~state.fcw & 0x3f) != 0) {
      throw Exception{kFloatingPointVector, std::nullopt, 0};
    }
  }

  kvm_fpu usable_x87() const {
    if ((cpu_.sregs.cr0 & (kCr0Em | kCr0Ts)) != 0) {
      throw Exception{kNoDeviceVector, std::nullopt, 0};
    }
    return cpu_.floating_point.load();
  }

  void x87() const {
    constexpr uint16_t kExceptionsAndBusy = 0x80ff;
    constexpr uint16_t kSummaryAndBusy = 0x8080;
    const uint8_t digit = in_.digit();
    if (in_.opcode == 0xd9 && in_.memory && digit == 7) {  // fnstcw
      store<uint16_t>(address(), usable_x87().fcw);
    } else if (in_.opcode == 0xd9 && in_.memory && digit == 5) {  // fldcw
      kvm_fpu state = usable_x87();
      raise_pending(state);
      state.fcw = static_cast<uint16_t>((load<uint16_t>(address()) & 0x1f3f) | 0x40);
      const bool pending = (state.fsw & ~state.fcw & 0x3f) != 0;
      state.fsw =
          static_cast<uint16_t>((state.fsw & ~kSummaryAndBusy) | (pending ? kSummaryAndBusy : 0));
      cpu_.floating_point.store(state);
    } else if (in_.opcode == 0xdb && in_.modrm == 0xe2) {  // fnclex
      kvm_fpu state = usable_x87();
      state.fsw &= static_cast<uint16_t>(~kExceptionsAndBusy);
      cpu_.floating_point.store(state);
    } else if (in_.opcode == 0xdd && in_.memory && digit == 7) {  // fnstsw m16
      store<uint16_t>(address(), usable_x87().fsw);
    } else if (in_.opcode == 0xdf && in_.modrm == 0xe0) {  // fnstsw ax
      set(0, usable_x87().fsw, 16);
    } else {
      throw Unknown{};
    }
  }

  // --- Two bytes ---

  void two_bytes() const {
    if (in_.opcode != 0xc7) plain_or_unknown();
    switch (in_.opcode) {
      case 0x00:
        if (in_.digit() < 4 || in_.digit() > 5) throw Unknown{};
        return verify(in_.digit() == 5);
      case 0x01:
        return system_group();
      case 0x02:
      case 0x03:
        return load_descriptor_part();
      case 0x77: {
        kvm_fpu state = usable_x87();
        raise_pending(state);
        state.ftwx = 0;  // all registers are free: the saved form has a bit for each in use
        return cpu_.floating_point.store(state);
      }
      case 0xae:
        return fence_group();
      case 0xb8:
        if (in_.selector != Selector::kF3) throw Unknown{};
        return general();
      case 0xb9:
        undefined();
      default:
        return compare_exchange_16();
    }
  }

  void system_group() const {
    switch (in_.modrm) {
      case 0xca:  // clac
        return privileged(), flags(kAc, 0);
      case 0xcb:  // stac
        return privileged(), flags(kAc, kAc);
      case 0xfc: {  // clzero
        const std::array<std::byte, 64> zeroes{};
        return paging_.write((cpu_.regs.rax & ~uint64_t{63}) + segment_base(), zeroes);
      }
      case 0xc8:  // monitor: mwait then returns at once, which it always may
      case 0xc9:  // mwait
        return privileged();
      default:
        throw Unknown{};
    }
  }

  void privileged() const {
    if (cpu_.sregs.ss.dpl != 0) undefined();
  }

  void fence_group() const {
    if (!in_.memory) throw Unknown{};
    if (in_.selector == Selector::k66 && in_.digit() == 6) {  // clwb
      (void)load<uint8_t>(address());
      return;
    }
    if (in_.selector != Selector::kNone || (in_.digit() != 2 && in_.digit() != 3)) throw Unknown{};
    if ((cpu_.sregs.cr4 & kCr4OsFxsr) == 0 || (cpu_.sregs.cr0 & kCr0Em) != 0) undefined();
    kvm_fpu state = usable_x87();
    if (in_.digit() == 3) return store<uint32_t>(address(), state.mxcsr);
    const auto value = load<uint32_t>(address());
    if ((value & 0xffff0000) != 0) throw Exception{kProtectionVector, 0, 0};
    state.mxcsr = value;
    cpu_.floating_point.store(state);
  }

  void compare_exchange_16() const {
    if (!in_.memory || in_.digit() != 1 || !in_.wide) throw Unknown{};
    const uint64_t at = address();
    if (at % 16 != 0) throw Exception{kProtectionVector, 0, 0};
    std::byte* const host = paging_.writable(at, 16);
    uint64_t low = cpu_.regs.rax;
    uint64_t high = cpu_.regs.rdx;
    bool same = false;
    // SAFETY: sixteen aligned bytes of guest memory. Atomic as the guest's own instruction would
    // be, with or without LOCK: other vCPUs run.
    asm volatile("lock cmpxchg16b %[mem]"
                 : [mem] "+m"(*reinterpret_cast<unsigned __int128*>(host)), "=@ccz"(same),
                   "+a"(low), "+d"(high)
                 : "b"(uint64_t{cpu_.regs.rbx}), "c"(uint64_t{cpu_.regs.rcx})
                 : "memory");
    cpu_.regs.rax = low;
    cpu_.regs.rdx = high;
    zero_flag(same);
  }

  // --- Segment descriptors ---

  struct Descriptor {
    uint64_t low = 0;
    uint8_t type() const { return (low >> 40) & 0xf; }
    bool code_or_data() const { return (low >> 44 & 1) != 0; }
    uint8_t dpl() const { return (low >> 45) & 3; }
    bool conforming() const { return code_or_data() && (type() & 0xc) == 0xc; }
  };

  // Of the selector that ModRM names; nothing where the current code may not see it.
  std::optional<Descriptor> visible_descriptor() const {
    const auto selector = static_cast<uint16_t>(source(16));
    const bool local = (selector & 4) != 0;
    const uint64_t base = local ? cpu_.sregs.ldt.base : cpu_.sregs.gdt.base;
    const uint64_t limit = local ? cpu_.sregs.ldt.limit : cpu_.sregs.gdt.limit;
    const uint32_t offset = selector & ~7u;
    if ((selector & ~3u) == 0 || offset + 7 > limit) return std::nullopt;
    Descriptor out;
    paging_.read_as_system(base + offset, std::as_writable_bytes(std::span(&out.low, 1)));
    const uint8_t privilege = std::max<uint8_t>(cpu_.sregs.ss.dpl, selector & 3);
    if (!out.conforming() && out.dpl() < privilege) return std::nullopt;
    return out;
  }

  void verify(bool for_writing) const {
    const auto descriptor = visible_descriptor();
    if (!descriptor || !descriptor->code_or_data()) return zero_flag(false);
    const bool code = (descriptor->type() & 8) != 0;
    const bool flag = (descriptor->type() & 2) != 0;  // readable code, writable data
    zero_flag(for_writing ? !code && flag : !code || flag);
  }

  void load_descriptor_part() const {
    const bool limit = in_.opcode == 0x03;
    const auto descriptor = visible_descriptor();
    if (!descriptor || !has_part(*descriptor, limit)) return zero_flag(false);
    const uint64_t low = descriptor->low;
    uint64_t value = (low >> 32) & 0x00f0ff00;
    if (limit) {
      value = (low & 0xffff) | (low >> 32 & 0xf0000);
      if ((low >> 55 & 1) != 0) value = (value << 12) | 0xfff;
    }
    set(in_.reg, value, operand_bits());
    zero_flag(true);
  }

  static bool has_part(const Descriptor& descriptor, bool limit) {
    if (descriptor.code_or_data()) return true;
    switch (descriptor.type()) {  // system types of 64-bit mode
      case 2:
      case 9:
      case 11:
        return true;
      case 12:
        return !limit;  // a call gate has rights only
      default:
        return false;
    }
  }

  // --- Arithmetic ---

  void general() const {
    plain_or_unknown();
    const bool byte_source = in_.map == Map::k0f38 && !in_.vex && in_.opcode == 0xf0;
    BitOperation operation;
    operation.bits = operand_bits();
    operation.source = source(byte_source ? 8 : operation.bits);
    operation.source_bits = byte_source ? 8 : operation.bits;
    operation.destination = reg(in_.reg);
    operation.second = in_.vex ? uint64_t{reg(in_.vvvv)} : 0;
    operation.rdx = cpu_.regs.rdx;
    operation.flags = cpu_.regs.rflags;
    if (!perform(in_, operation)) throw Unknown{};
    cpu_.regs.rflags = operation.flags;
    if (operation.second_written) set(in_.vvvv, operation.second, operation.bits);
    if (operation.destination_written) set(in_.reg, operation.destination, operation.bits);
  }

  Cpu& cpu_;
  const Instruction& in_;
  const Paging paging_;
};

}  // namespace

Outcome execute(Cpu& cpu, std::span<const uint8_t> bytes, Exception& exception) {
  constexpr uint64_t kLongModeActive = 1 << 10;
  if ((cpu.sregs.efer & kLongModeActive) == 0 || cpu.sregs.cs.l == 0) return Outcome::kUnknown;
  const auto instruction = decode(bytes);
  if (!instruction) return Outcome::kUnknown;
  try {
    Executor(cpu, *instruction).run();
  } catch (const Unknown&) {
    return Outcome::kUnknown;
  } catch (const NotRam&) {
    return Outcome::kUnknown;
  } catch (const Exception& raised) {
    exception = raised;
    return Outcome::kException;
  }
  cpu.regs.rip += instruction->length;
  return Outcome::kDone;
}

}  // namespace minivmm::vmm::emulate
