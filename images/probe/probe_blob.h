// SPDX-License-Identifier: Apache-2.0
// The probe guest's ELF file, embedded in the program that links minivmm_probe_blob. It lives as
// long as the program.
#pragma once

#include <cstddef>
#include <span>

namespace minivmm::probe {

std::span<const std::byte> probe_elf() noexcept;

}  // namespace minivmm::probe
