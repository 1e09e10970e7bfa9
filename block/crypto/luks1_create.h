// SPDX-License-Identifier: Apache-2.0
// Making a LUKS1 header with one key slot.
#pragma once

#include <string>

#include <chrono>
#include <cstdint>
#include <optional>

#include "block/crypto/cipher_spec.h"
#include "block/crypto/hash.h"
#include "block/crypto/luks1_header.h"
#include "block/crypto/luks1_slots.h"
#include "block/crypto/luks1_unlock.h"
#include "block/crypto/luks_area.h"
#include "block/graph/options.h"

namespace minivmm::block::crypto {

struct Luks1CreateOptions {
  CipherSpec cipher;  // aes-256, xts, plain64
  Hash hash = Hash::kSha256;
  std::chrono::milliseconds iter_time = kDefaultIterTime;
  std::string key_secret;           // the id of the password's secret object
  uint32_t stripes = kLuksStripes;  // no option: others accept only this
};

// Takes QEMU's options: key-secret, cipher-alg, cipher-mode, ivgen-alg, ivgen-hash-alg, hash-alg,
// iter-time. (For qcow2 the caller passes what stands under "encrypt".) Throws EINVAL, ENOTSUP
// naming what there is not.
Luks1CreateOptions take_luks1_create_options(Options& options);

// Milliseconds, at least 1.
std::optional<std::chrono::milliseconds> take_iter_time(Options& options);

// From the beginning of the header to where the payload begins; a multiple of 4096. The same as
// QEMU's for the same options.
uint64_t luks1_header_bytes(const Luks1CreateOptions& options);

struct NewLuks1 {
  Luks1Header header;
  SecureBytes master_key;
};

// Writes header and key material into an area of at least luks1_header_bytes; what it held in
// between stays. The header comes last: before it there is no LUKS image. Durable on return. Fiber.
NewLuks1 create_luks1(LuksArea& area, const Luks1CreateOptions& options);

}  // namespace minivmm::block::crypto
