// SPDX-License-Identifier: Apache-2.0
#include "vmm/cpu_setup.h"

#include <gtest/gtest.h>

#include "base/bytes.h"
#include "vmm/layout.h"

namespace minivmm::vmm {
namespace {

const kvm_cpuid_entry2* find(const std::vector<kvm_cpuid_entry2>& table, uint32_t function,
                             uint32_t index = 0) {
  for (const auto& entry : table) {
    if (entry.function == function && entry.index == index) return &entry;
  }
  return nullptr;
}

std::vector<kvm_cpuid_entry2> sample() {
  std::vector<kvm_cpuid_entry2> out;
  const auto add = [&](uint32_t function, uint32_t index, uint32_t eax, uint32_t ebx, uint32_t ecx,
                       uint32_t edx) {
    kvm_cpuid_entry2 entry{};
    entry.function = function;
    entry.index = index;
    entry.eax = eax;
    entry.ebx = ebx;
    entry.ecx = ecx;
    entry.edx = edx;
    out.push_back(entry);
  };
  add(1, 0, 0x600, 0x01020304, (1u << 5) | (1u << 15) | 1, 0);
  add(4, 0, 0x121, 0, 0, 0);
  add(4, 3, 0x163, 0, 0, 0);
  add(0xa, 0, 1, 2, 3, 4);
  add(0x40000000, 0, 0x40000001, 0x4b4d564b, 0x564b4d56, 0x4d);
  add(0x80000001, 0, 0, 0, 1u << 2, 0);
  return out;
}

// Without the hypervisor bit Linux does not look for kvmclock and hangs where there is no PIT.
TEST(Cpuid, SaysThatThereIsAHypervisor) {
  const auto table = make_cpuid(sample(), {.apic_id = 0, .vcpus = 1});
  EXPECT_NE(find(table, 1)->ecx & (1u << 31), 0u);
}

TEST(Cpuid, HidesWhatTheGuestCannotUse) {
  const auto table = make_cpuid(sample(), {.apic_id = 0, .vcpus = 1});
  EXPECT_EQ(find(table, 1)->ecx & ((1u << 5) | (1u << 15)), 0u);
  EXPECT_EQ(find(table, 0x80000001)->ecx & (1u << 2), 0u);
  EXPECT_EQ(find(table, 0xa)->eax, 0u);
}

// Linux with several CPUs hangs on wrong ids; the second topology leaf is not in KVM's table.
TEST(Cpuid, GivesEachVcpuItsIdAndTheTopology) {
  const auto table = make_cpuid(sample(), {.apic_id = 3, .vcpus = 5, .tsc_deadline = true});
  EXPECT_EQ(find(table, 1)->ebx >> 24, 3u);
  EXPECT_EQ((find(table, 1)->ebx >> 16) & 0xff, 5u);
  EXPECT_NE(find(table, 1)->edx & (1u << 28), 0u);
  EXPECT_NE(find(table, 1)->ecx & (1u << 24), 0u);
  ASSERT_NE(find(table, 0xb, 1), nullptr);
  EXPECT_EQ(find(table, 0xb, 0)->edx, 3u);
  EXPECT_EQ(find(table, 0xb, 1)->eax, 3u) << "bits that hold five ids";
  EXPECT_EQ(find(table, 0xb, 1)->ebx, 5u);
  EXPECT_EQ(find(table, 0xb, 1)->ecx, 0x201u);
  EXPECT_EQ(find(table, 4, 0)->eax >> 26, 4u);
  EXPECT_EQ((find(table, 4, 3)->eax >> 14) & 0xfff, 4u) << "the last level cache is shared";
  EXPECT_EQ((find(table, 4, 0)->eax >> 14) & 0xfff, 0u) << "the first is not";
}

// KVM of Linux before 6.2 copies these leaves from the host. A level of them that stays makes a
// guest believe in dies, or take the id of the host's processor for its own.
TEST(Cpuid, NothingOfTheHostsTopologyIsLeft) {
  auto supported = sample();
  for (const uint32_t function : {0xbu, 0x1fu}) {
    for (uint32_t index = 0; index < 4; ++index) {
      kvm_cpuid_entry2 entry{};
      entry.function = function;
      entry.index = index;
      entry.eax = 5;
      entry.ebx = 16;
      entry.ecx = ((index < 3 ? index + 1 : 0) << 8) | index;
      entry.edx = 0x5555;
      supported.push_back(entry);
    }
  }
  const auto table = make_cpuid(supported, {.apic_id = 1, .vcpus = 2});
  for (const uint32_t function : {0xbu, 0x1fu}) {
    ASSERT_NE(find(table, function, 0), nullptr);
    ASSERT_NE(find(table, function, 1), nullptr);
    EXPECT_EQ(find(table, function, 1)->ebx, 2u);
    EXPECT_EQ(find(table, function, 2), nullptr) << "a level more";
  }
  for (const auto& entry : table) EXPECT_NE(entry.edx, 0x5555u) << "leaf " << entry.function;
}

// A leaf above the largest one is not looked at.
TEST(Cpuid, TheTopologyIsWithinTheLeavesThatThereAre) {
  auto supported = sample();
  kvm_cpuid_entry2 entry{};
  entry.eax = 7;
  supported.push_back(entry);
  EXPECT_EQ(find(make_cpuid(supported, {.apic_id = 0, .vcpus = 2}), 0)->eax, 0xbu);
  supported.back().eax = 0x1f;
  EXPECT_EQ(find(make_cpuid(supported, {.apic_id = 0, .vcpus = 2}), 0)->eax, 0x1fu);
}

// The host's sixteen threads do not share a guest's cache.
TEST(Cpuid, CachesAreThoseOfTheGuestsProcessors) {
  auto supported = sample();
  for (const uint32_t level : {1u, 3u}) {
    kvm_cpuid_entry2 entry{};
    entry.function = 0x8000001d;
    entry.index = level;
    entry.eax = (15u << 14) | (level << 5) | 1;
    supported.push_back(entry);
  }
  const auto table = make_cpuid(supported, {.apic_id = 0, .vcpus = 3});
  EXPECT_EQ(find(table, 0x8000001d, 1)->eax >> 14, 0u);
  EXPECT_EQ(find(table, 0x8000001d, 3)->eax >> 14, 2u);
}

TEST(Cpuid, TellsTheTscFrequency) {
  const auto table = make_cpuid(sample(), {.apic_id = 0, .vcpus = 1, .tsc_khz = 2500000});
  EXPECT_EQ(find(table, 0x40000000)->eax, 0x40000010u);
  ASSERT_NE(find(table, 0x40000010), nullptr);
  EXPECT_EQ(find(table, 0x40000010)->eax, 2500000u);
}

TEST(EntryState, LinuxEntersLongModeWithItsZeroPage) {
  kvm_sregs sregs{};
  kvm_regs regs{};
  enter_state({EntryMode::kLong64, 0x100200, kZeroPageAddress}, sregs, regs);
  EXPECT_EQ(regs.rip, 0x100200u);
  EXPECT_EQ(regs.rsi, kZeroPageAddress);
  EXPECT_EQ(regs.rflags, 2u);
  EXPECT_EQ(sregs.cs.selector, 0x10);
  EXPECT_EQ(sregs.cs.l, 1);
  EXPECT_EQ(sregs.cs.limit, 0xffffffffu);
  EXPECT_EQ(sregs.ss.selector, 0x18);
  EXPECT_EQ(sregs.efer, 0x500u);
  EXPECT_EQ(sregs.cr3, kPageTableAddress);
  EXPECT_EQ(sregs.cr0 & 0x60000000, 0u) << "caches on";
}

TEST(EntryState, PvhEntersFlatProtectedMode) {
  kvm_sregs sregs{};
  kvm_regs regs{};
  enter_state({EntryMode::kProtected32, 0x200000, 0x6000}, sregs, regs);
  EXPECT_EQ(regs.rbx, 0x6000u);
  EXPECT_EQ(sregs.cs.l, 0);
  EXPECT_EQ(sregs.cs.db, 1);
  EXPECT_EQ(sregs.cs.limit, 0xffffffffu);
  EXPECT_EQ(sregs.tr.limit, 0x67u);
  EXPECT_EQ(sregs.cr0, 0x11u);
  EXPECT_EQ(sregs.efer, 0u);
}

TEST(LocalInterrupts, KeepsTheOtherBits) {
  kvm_lapic_state lapic{};
  base::store_le<uint32_t>(lapic.regs + 0x350, 0x10200);
  set_local_interrupts(lapic);
  EXPECT_EQ(base::load_le<uint32_t>(lapic.regs + 0x350), 0x10700u);
  EXPECT_EQ(base::load_le<uint32_t>(lapic.regs + 0x360), 0x400u);
}

}  // namespace
}  // namespace minivmm::vmm
