// SPDX-License-Identifier: Apache-2.0
// Changes of LUKS1 key slots on the disk, in an order that a loss of power cannot hurt. What other
// slots open stays open at every moment.
//
//   adding    key material -> flush -> salt and iterations, still inactive -> flush -> active. (A
//             slot's entry may straddle two sectors, its first word does not: a torn write leaves
//             the slot inactive or whole.)
//   erasing   key material is overwritten -> flush -> inactive -> flush. So a slot that is inactive
//             holds nothing that its password opens; cut in between, it is active and opens no
//             more, and is erased by its number.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>

#include "block/crypto/luks1_header.h"
#include "block/crypto/luks_area.h"

namespace minivmm::block::crypto {

// QEMU's default, and its bounds.
inline constexpr std::chrono::milliseconds kDefaultIterTime{2000};
inline constexpr std::chrono::milliseconds kMaxIterTime{3'600'000};

// Makes an inactive slot open with the password. `header` says so afterwards; after an error it,
// and the disk, say that the slot is inactive, unless the last write failed. Fiber.
void add_slot(LuksArea& area, Luks1Header& header, size_t slot,
              std::span<const std::byte> master_key, std::span<const std::byte> password,
              std::chrono::milliseconds iter_time);

// Destroys a slot's key material and makes it inactive. The caller has made sure that this is
// meant. Fiber.
void erase_slot(LuksArea& area, Luks1Header& header, size_t slot);

}  // namespace minivmm::block::crypto
