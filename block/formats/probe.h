// SPDX-License-Identifier: Apache-2.0
// Which format a file's first bytes look like. Pure. A guess: only the format that a user states
// is certain, and what is taken for raw by default is guarded (see raw.h).
#pragma once

#include <string_view>

#include <cstddef>
#include <span>

namespace minivmm::block {

inline constexpr size_t kProbeBytes = 512;

// The name of a format whose signature the bytes have ("qcow2", "vmdk", ...), whether or not there
// is a driver for it; "raw" where none matches.
std::string_view probe_format(std::span<const std::byte> first_bytes) noexcept;

}  // namespace minivmm::block
