// SPDX-License-Identifier: Apache-2.0
// Goes on where KVM's instruction emulator gave up: the instruction is done here (vmm/emulate).
// Only for hosts whose KVM has no hardware virtualization. On the vCPU's thread.
#pragma once

#include <linux/kvm.h>

#include "virtio/guest_memory.h"

namespace minivmm::vmm {

// `run` as KVM_RUN left it with KVM_EXIT_INTERNAL_ERROR. True if the vCPU can go on; false, with
// nothing changed, for what cannot be done here or is no instruction that KVM lacks.
bool complete_instruction(int vcpu_fd, const kvm_run& run,
                          const virtio::GuestMemory& memory) noexcept;

}  // namespace minivmm::vmm
