// SPDX-License-Identifier: Apache-2.0
// qcow2's encryption method 1: AES-128-CBC, the key is the password itself. It is weak (no salt, no
// derivation, a key that cannot be changed, initialization vectors that repeat with each rewrite),
// and there for the images that have it. qcow2.txt, "Data encryption".
#pragma once

#include <string>

#include <memory>

#include "block/crypto/sector_cipher.h"

namespace minivmm::block::crypto {

// The key is the first 16 bytes of the secret's password, filled up with zeroes. Sectors are
// numbered by their place on the guest's disk. Nothing can tell a wrong password from the right
// one. Throws ENOENT without such a secret, EINVAL where it is not UTF-8. Fiber.
std::unique_ptr<SectorCipher> qcow_aes_cipher(const std::string& secret_id);

}  // namespace minivmm::block::crypto
