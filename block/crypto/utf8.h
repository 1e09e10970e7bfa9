// SPDX-License-Identifier: Apache-2.0
// Whether bytes are text. Pure.
#pragma once

#include <cstddef>
#include <span>

namespace minivmm::block::crypto {

// Well-formed UTF-8 without zero bytes.
bool is_utf8(std::span<const std::byte> bytes) noexcept;

}  // namespace minivmm::block::crypto
