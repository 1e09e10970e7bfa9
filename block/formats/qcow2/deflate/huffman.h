// SPDX-License-Identifier: Apache-2.0
// Prefix codes as deflate has them: from how often each symbol occurs to the length of its code,
// and from lengths to codes. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace minivmm::block::qcow2::deflate {

// The best lengths of at most `most` bits; 0 for what does not occur. At least two symbols get
// one, because not every reader takes a code of one. At most 288 symbols, whose counts add up to
// less than 2^17.
void code_lengths(std::span<const uint32_t> counts, unsigned most, std::span<uint8_t> lengths);

// The codes, with the bit that is sent first as the lowest.
void codes_of(std::span<const uint8_t> lengths, std::span<uint16_t> codes);

}  // namespace minivmm::block::qcow2::deflate
