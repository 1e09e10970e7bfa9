// SPDX-License-Identifier: Apache-2.0
// Encrypts and decrypts sectors of 512 bytes, each with an initialization vector made of its
// number. What an encrypted disk holds once it is unlocked.
//
// Any thread and any loop, many at once: each call borrows an engine of its own. No method
// suspends. What a call costs: about a microsecond for 4 KiB with the processor's AES instructions;
// large requests belong in the work pool (crypt_on_fiber).
//
// For the number of the first sector: the driver `luks` counts from the beginning of the payload.
// qcow2 with encryption method 2 ("LUKS") counts host sectors, from the beginning of the image file
// (qcow2.txt, "Data encryption": "the physical disk sector as the input tweak"): host offset / 512,
// whatever the guest's offset, in sectors of 512 bytes also where a cluster is larger. With an
// external data file it is the offset in that file. Compressed clusters are not encrypted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "block/crypto/cipher_engine.h"
#include "block/crypto/cipher_spec.h"
#include "block/crypto/secure_bytes.h"

namespace minivmm::block::crypto {

class SectorCipher {
 public:
  // `key` has spec.key_size() bytes. Throws what GnuTLS has against it. Not on a fiber (gnutls.h).
  SectorCipher(const CipherSpec& spec, std::span<const std::byte> key);
  SectorCipher(const SectorCipher&) = delete;
  SectorCipher& operator=(const SectorCipher&) = delete;
  ~SectorCipher();

  const CipherSpec& spec() const noexcept { return spec_; }

  // In place, whole sectors. Nobody else may change the memory meanwhile: not guest memory. Throws
  // EIO; then the content of `data` is undefined.
  void encrypt(uint64_t first_sector, std::span<std::byte> data) const;
  void decrypt(uint64_t first_sector, std::span<std::byte> data) const;

  enum class Direction : uint8_t { kEncrypt, kDecrypt };
  // The same on a fiber: here if it is little, otherwise in the work pool.
  void crypt_on_fiber(Direction direction, uint64_t first_sector, std::span<std::byte> data) const;

 private:
  struct Engine;
  class Borrowed;
  void crypt(Direction direction, uint64_t first_sector, std::span<std::byte> data) const;

  const CipherSpec spec_;
  const SecureBytes key_;
  SecureBytes iv_key_;  // of essiv
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Engine>> idle_;  // guarded by mutex_
};

}  // namespace minivmm::block::crypto
