// SPDX-License-Identifier: Apache-2.0
// What a vCPU's registers and CPUID hold before its first instruction. Pure: KVM's structures in,
// changed structures out.
#pragma once

#include <linux/kvm.h>

#include <cstdint>
#include <span>
#include <vector>

#include "vmm/loader.h"

namespace minivmm::vmm {

struct CpuidInput {
  uint32_t apic_id = 0;
  uint32_t vcpus = 1;
  bool tsc_deadline = false;  // KVM_CAP_TSC_DEADLINE_TIMER
  uint32_t tsc_khz = 0;       // 0: not known
};

// Turns KVM_GET_SUPPORTED_CPUID's table into one vCPU's: its APIC id, the topology leaves, the
// hypervisor bit; nested virtualization and the performance counters hidden.
std::vector<kvm_cpuid_entry2> make_cpuid(std::span<const kvm_cpuid_entry2> supported,
                                         const CpuidInput& input);

// `sregs` as KVM_GET_SREGS gave it.
void enter_state(const BootState& boot, kvm_sregs& sregs, kvm_regs& regs);

// Model-specific registers with the values a firmware would leave.
std::vector<kvm_msr_entry> boot_msrs();

// LINT0 delivers ExtINT, LINT1 delivers NMI.
void set_local_interrupts(kvm_lapic_state& lapic);

}  // namespace minivmm::vmm
