// SPDX-License-Identifier: Apache-2.0
// Reading a LUKS1 header, and finding the key slot that a password opens.
//
// An iteration count is 32 bits of an image that may be hostile, and stands for up to hours of
// computing. So the cost of each slot is estimated from this machine's measured speed before it is
// tried, and slots that do not fit into what is left of a limit are not tried. The limit is of
// processor time for all slots together: kDefaultUnlockTime is 30 s, many times what QEMU and
// cryptsetup set a slot up for (2 s), and `unlock-time` is its option.
#pragma once

#include <chrono>
#include <cstddef>
#include <optional>
#include <span>

#include "block/crypto/luks1_header.h"
#include "block/crypto/luks_area.h"
#include "block/crypto/secure_bytes.h"

namespace minivmm::block::crypto {

inline constexpr std::chrono::milliseconds kDefaultUnlockTime{30'000};

// Reads, parses and checks. Fiber. Throws as parse_luks1 and check_luks1_place.
Luks1Header read_luks1(LuksArea& area, bool holds_payload);

struct Luks1Key {
  SecureBytes master;  // the key of the payload
  size_t slot = 0;     // that the password opened
};

// Tries the active slots in order. Fiber; computes in key_pool(). Throws EACCES for a wrong
// password, ETIME naming the slot where one was not tried because of the limit.
Luks1Key unlock_luks1(LuksArea& area, const Luks1Header& header,
                      std::span<const std::byte> password,
                      std::chrono::milliseconds limit = kDefaultUnlockTime);

// The master key if the password opens that (active) slot. Fiber. Throws ETIME where it costs more
// than the limit.
std::optional<SecureBytes> try_slot(LuksArea& area, const Luks1Header& header, size_t slot,
                                    std::span<const std::byte> password,
                                    std::chrono::milliseconds limit = kDefaultUnlockTime);

}  // namespace minivmm::block::crypto
