// SPDX-License-Identifier: Apache-2.0
#include "images/probe/probe_blob.h"

extern "C" {
extern const std::byte minivmm_probe_elf_begin[];
extern const std::byte minivmm_probe_elf_end[];
}

namespace minivmm::probe {

std::span<const std::byte> probe_elf() noexcept {
  return {minivmm_probe_elf_begin, minivmm_probe_elf_end};
}

}  // namespace minivmm::probe
