// SPDX-License-Identifier: Apache-2.0
// One cipher with one key, as one thread uses it: what SectorCipher keeps several of. Throws EIO
// with GnuTLS's text.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>

#include "block/crypto/cipher_spec.h"

namespace minivmm::block::crypto {

inline constexpr size_t kAesBlock = 16;
using Iv = std::array<std::byte, kAesBlock>;

// A gnutls_cipher_hd_t.
class CipherHandle {
 public:
  // `algorithm` is a gnutls_cipher_algorithm_t, whose key and IV sizes are the caller's to keep to.
  CipherHandle(int algorithm, std::span<const std::byte> key);
  CipherHandle(const CipherHandle&) = delete;
  CipherHandle& operator=(const CipherHandle&) = delete;
  ~CipherHandle();

  // In place.
  void encrypt(const Iv& iv, std::span<std::byte> data);
  void decrypt(const Iv& iv, std::span<std::byte> data);

 private:
  void* handle_ = nullptr;
};

// gnutls_cipher_algorithm_t of AES in CBC with a key of that size: 16, 24 or 32.
int aes_cbc_of(size_t key_size) noexcept;

// Sectors, each with its IV.
class CipherEngine {
 public:
  virtual ~CipherEngine() = default;
  // In place; whole blocks of 16 bytes.
  virtual void encrypt(const Iv& iv, std::span<std::byte> data) = 0;
  virtual void decrypt(const Iv& iv, std::span<std::byte> data) = 0;
};

// The key has spec.key_size() bytes. Loads GnuTLS.
std::unique_ptr<CipherEngine> make_engine(const CipherSpec& spec, std::span<const std::byte> key);

}  // namespace minivmm::block::crypto
