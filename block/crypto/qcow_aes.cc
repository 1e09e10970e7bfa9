// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/qcow_aes.h"

#include <algorithm>

#include "block/crypto/kdf.h"
#include "block/crypto/secret.h"

namespace minivmm::block::crypto {

std::unique_ptr<SectorCipher> qcow_aes_cipher(const std::string& secret_id) {
  const CipherSpec spec{CipherAlgorithm::kAes128, CipherMode::kCbc, IvGenerator::kPlain64};
  const SecureBytes password = secrets().get_text(secret_id);
  SecureBytes key(spec.key_size());
  std::copy_n(password.data(), std::min(password.size(), key.size()), key.data());
  return key_pool().run([&] { return std::make_unique<SectorCipher>(spec, key.span()); });
}

}  // namespace minivmm::block::crypto
