// SPDX-License-Identifier: Apache-2.0
// Tries whether a guest program's `syscall` instruction enters its kernel, with a guest of a few
// instructions. On KVM without hardware virtualization it does not, which no capability tells.
#pragma once

#include <optional>

#include "vmm/kvm_api.h"

namespace minivmm::vmm {

// Unset where the guest did neither. Throws base::Error where KVM refuses to make it.
std::optional<bool> guest_syscall_works(const Kvm& kvm);

}  // namespace minivmm::vmm
