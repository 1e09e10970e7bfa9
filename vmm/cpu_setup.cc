// SPDX-License-Identifier: Apache-2.0
#include "vmm/cpu_setup.h"

#include <algorithm>
#include <bit>

#include "base/bytes.h"
#include "vmm/layout.h"
#include "vmm/linux_boot.h"

namespace minivmm::vmm {
namespace {

constexpr uint32_t bit(unsigned n) { return uint32_t{1} << n; }

kvm_cpuid_entry2& leaf(std::vector<kvm_cpuid_entry2>& table, uint32_t function, uint32_t index,
                       bool indexed) {
  for (auto& entry : table) {
    if (entry.function == function && entry.index == index) return entry;
  }
  kvm_cpuid_entry2 fresh{};
  fresh.function = function;
  fresh.index = index;
  fresh.flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
  return table.emplace_back(fresh);
}

// One thread a core, all cores in one package. What KVM copied from the host goes: it has levels
// (modules, dies) and ids of processors that the guest does not have.
void set_topology(std::vector<kvm_cpuid_entry2>& table, uint32_t function,
                  const CpuidInput& input) {
  std::erase_if(table, [&](const auto& entry) { return entry.function == function; });
  const auto package_bits = static_cast<uint32_t>(std::bit_width(input.vcpus - 1));
  auto& threads = leaf(table, function, 0, true);
  threads.eax = 0;
  threads.ebx = 1;
  threads.ecx = 0x100;
  threads.edx = input.apic_id;
  auto& cores = leaf(table, function, 1, true);
  cores.eax = package_bits;
  cores.ebx = input.vcpus;
  cores.ecx = 0x201;
  cores.edx = input.apic_id;
}

void fix_leaf_1(kvm_cpuid_entry2& entry, const CpuidInput& input) {
  entry.ebx =
      (entry.ebx & 0xff) | (8 << 8) | (std::min(input.vcpus, 255u) << 16) | (input.apic_id << 24);
  // Without the hypervisor bit a guest does not look for kvmclock.
  entry.ecx |= bit(31);
  entry.ecx &= ~(bit(5) | bit(15));  // VMX, PDCM
  entry.ecx = input.tsc_deadline ? entry.ecx | bit(24) : entry.ecx & ~bit(24);
  entry.edx = input.vcpus > 1 ? entry.edx | bit(28) : entry.edx & ~bit(28);
}

// A cache: the last level is everybody's, the others are a core's own. The bits above who shares it
// are the number of cores in leaf 4, and nothing in AMD's.
void fix_cache(kvm_cpuid_entry2& entry, const CpuidInput& input) {
  if ((entry.eax & 0x1f) == 0) return;
  const uint32_t level = (entry.eax >> 5) & 7;
  const uint32_t sharing = level >= 3 ? input.vcpus - 1 : 0;
  const uint32_t cores = entry.function == 4 ? std::min(input.vcpus - 1, 0x3fu) << 26 : 0;
  entry.eax = (entry.eax & 0x3fff) | (std::min(sharing, 0xfffu) << 14) | cores;
}

void fix_entry(kvm_cpuid_entry2& entry, const CpuidInput& input) {
  switch (entry.function) {
    case 1:
      return fix_leaf_1(entry, input);
    case 4:
    case 0x8000001d:
      return fix_cache(entry, input);
    case 6:
      entry.eax &= ~bit(1);  // turbo
      entry.ecx &= ~bit(3);  // energy bias
      return;
    case 7:
      if (entry.index == 0) entry.ecx &= ~bit(5);  // WAITPKG
      return;
    case 0xa:
      entry.eax = entry.ebx = entry.ecx = entry.edx = 0;
      return;
    case 0x80000001:
      entry.ecx &= ~bit(2);  // SVM
      return;
    case 0x80000008:
      entry.ecx = input.vcpus > 1 ? (static_cast<uint32_t>(std::bit_width(input.vcpus - 1)) << 12) |
                                        (input.vcpus - 1)
                                  : 0;
      return;
    case 0x8000001e:
      entry.eax = input.apic_id;
      entry.ebx = input.apic_id & 0xff;
      entry.ecx = 0;
      return;
    default:
      return;
  }
}

kvm_segment segment(uint16_t selector, uint64_t descriptor) {
  kvm_segment out{};
  out.selector = selector;
  out.base = ((descriptor >> 16) & 0xffffff) | ((descriptor >> 56) << 24);
  const auto raw_limit =
      static_cast<uint32_t>((descriptor & 0xffff) | (((descriptor >> 48) & 0xf) << 16));
  out.g = (descriptor >> 55) & 1;
  out.limit = out.g != 0 ? (raw_limit << 12) | 0xfff : raw_limit;
  out.type = (descriptor >> 40) & 0xf;
  out.s = (descriptor >> 44) & 1;
  out.dpl = (descriptor >> 45) & 3;
  out.present = (descriptor >> 47) & 1;
  out.avl = (descriptor >> 52) & 1;
  out.l = (descriptor >> 53) & 1;
  out.db = (descriptor >> 54) & 1;
  return out;
}

void set_segments(kvm_sregs& sregs, uint64_t code, uint64_t data, uint64_t tss) {
  sregs.cs = segment(kLinuxCodeSelector, code);
  sregs.ds = segment(kLinuxDataSelector, data);
  sregs.es = sregs.fs = sregs.gs = sregs.ss = sregs.ds;
  sregs.tr = segment(kLinuxTssSelector, tss);
}

void enter_long_mode(kvm_sregs& sregs) {
  set_segments(sregs, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x008f8b000000ffff);
  sregs.gdt.base = kGdtAddress;
  sregs.gdt.limit = kLinuxGdtBytes - 1;
  sregs.cr0 = 0x80050033;  // PE MP ET NE WP AM PG, caches on
  sregs.cr3 = kPageTableAddress;
  sregs.cr4 = 0x20;    // PAE
  sregs.efer = 0x500;  // LME LMA
}

void enter_protected_mode(kvm_sregs& sregs) {
  set_segments(sregs, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00008b0000000067);
  sregs.gdt.base = 0;
  sregs.gdt.limit = 0;
  sregs.cr0 = 0x11;  // PE ET
  sregs.cr3 = 0;
  sregs.cr4 = 0;
  sregs.efer = 0;
}

}  // namespace

std::vector<kvm_cpuid_entry2> make_cpuid(std::span<const kvm_cpuid_entry2> supported,
                                         const CpuidInput& input) {
  std::vector<kvm_cpuid_entry2> table(supported.begin(), supported.end());
  for (auto& entry : table) fix_entry(entry, input);
  // The topology leaves are not always in KVM's table and a guest with several CPUs hangs on wrong
  // ones. 0x1f only where KVM offers it: it would hide 0xb.
  const bool has_1f = std::any_of(table.begin(), table.end(), [](const auto& entry) {
    return entry.function == 0x1f && entry.eax != 0;
  });
  auto& basic = leaf(table, 0, 0, false);
  basic.eax = std::max(basic.eax, 0xbu);
  set_topology(table, 0xb, input);
  if (has_1f) set_topology(table, 0x1f, input);
  auto& hypervisor = leaf(table, 0x40000000, 0, false);
  if (input.tsc_khz != 0 && hypervisor.ebx != 0) {
    // Timing leaf: TSC and bus frequency in kHz.
    hypervisor.eax = std::max(hypervisor.eax, 0x40000010u);
    auto& timing = leaf(table, 0x40000010, 0, false);
    timing.eax = input.tsc_khz;
    timing.ebx = 1000000;
  }
  return table;
}

void enter_state(const BootState& boot, kvm_sregs& sregs, kvm_regs& regs) {
  regs = {};
  regs.rip = boot.entry;
  regs.rflags = 2;
  sregs.idt.base = 0;
  sregs.idt.limit = 0;
  if (boot.mode == EntryMode::kLong64) {
    enter_long_mode(sregs);
    regs.rsi = boot.boot_data;
    regs.rsp = kBootStackTop;
    regs.rbp = kBootStackTop;
  } else {
    enter_protected_mode(sregs);
    regs.rbx = boot.boot_data;
  }
}

std::vector<kvm_msr_entry> boot_msrs() {
  const auto msr = [](uint32_t index, uint64_t value) {
    kvm_msr_entry entry{};
    entry.index = index;
    entry.data = value;
    return entry;
  };
  return {
      msr(0x174, 0),       // SYSENTER_CS, _ESP, _EIP
      msr(0x175, 0),       //
      msr(0x176, 0),       //
      msr(0xc0000081, 0),  // STAR
      msr(0xc0000082, 0),  // LSTAR
      msr(0xc0000083, 0),  // CSTAR
      msr(0xc0000084, 0),  // SYSCALL_MASK
      msr(0xc0000102, 0),  // KERNEL_GS_BASE
      msr(0x10, 0),        // TSC
      msr(0x1a0, 1),       // MISC_ENABLE: fast strings
      msr(0x2ff, 0x806),   // MTRRs on, write-back by default
  };
}

void set_local_interrupts(kvm_lapic_state& lapic) {
  constexpr size_t kLvt0 = 0x350;
  constexpr size_t kLvt1 = 0x360;
  constexpr uint32_t kExtInt = 7;
  constexpr uint32_t kNmi = 4;
  const auto set = [&](size_t offset, uint32_t mode) {
    const auto old = base::load_le<uint32_t>(lapic.regs + offset);
    base::store_le<uint32_t>(lapic.regs + offset, (old & ~0x700u) | (mode << 8));
  };
  set(kLvt0, kExtInt);
  set(kLvt1, kNmi);
}

}  // namespace minivmm::vmm
