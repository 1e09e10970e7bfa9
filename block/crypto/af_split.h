// SPDX-License-Identifier: Apache-2.0
// LUKS's anti-forensic split: a key becomes `stripes` times as many bytes, all of which are needed
// to get it back, so that destroying any part of them on the disk destroys it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "block/crypto/hash.h"
#include "block/crypto/secure_bytes.h"

namespace minivmm::block::crypto {

// `material` has key.size() * stripes bytes; stripes >= 1. Takes random bytes. Not on a fiber.
void af_split(Hash hash, std::span<const std::byte> key, uint32_t stripes,
              std::span<std::byte> material);
// The key of key_size bytes. Not on a fiber.
SecureBytes af_merge(Hash hash, std::span<const std::byte> material, uint32_t stripes,
                     size_t key_size);

}  // namespace minivmm::block::crypto
