// SPDX-License-Identifier: Apache-2.0
// Which cipher a disk's sectors are encrypted with, by its names in LUKS headers ("aes",
// "cbc-essiv:sha256") and in QEMU's options ("aes-256", "cbc", "essiv"). Pure values.
#pragma once

#include <string>
#include <string_view>

#include <cstddef>
#include <cstdint>

#include "block/crypto/hash.h"

namespace minivmm::block::crypto {

inline constexpr size_t kSectorSize = 512;

enum class CipherAlgorithm : uint8_t { kAes128, kAes192, kAes256 };
enum class CipherMode : uint8_t { kXts, kCbc };
// How a sector's number becomes its initialization vector.
enum class IvGenerator : uint8_t {
  kPlain,    // the low 32 bits of the number, little-endian
  kPlain64,  // the number, little-endian
  kEssiv,    // the number, encrypted with the hash of the key
};

struct CipherSpec {
  CipherAlgorithm algorithm = CipherAlgorithm::kAes256;
  CipherMode mode = CipherMode::kXts;
  IvGenerator iv = IvGenerator::kPlain64;
  Hash iv_hash = Hash::kSha256;  // of kEssiv; has no meaning otherwise

  // XTS uses two keys.
  size_t key_size() const noexcept;  // bytes
  bool operator==(const CipherSpec&) const = default;
};

// From the three fields of a LUKS header. Throws ENOTSUP naming what there is no cipher for, and
// EINVAL where the key has a size that the cipher cannot have.
CipherSpec cipher_from_luks(std::string_view name, std::string_view mode, size_t key_bytes);
// "xts-plain64", "cbc-essiv:sha256". The name is always kLuksCipherName.
std::string luks_cipher_mode(const CipherSpec& spec);
inline constexpr const char* kLuksCipherName = "aes";

// QEMU's option values: cipher-alg, cipher-mode, ivgen-alg. Throw ENOTSUP naming what there is.
CipherAlgorithm parse_cipher_algorithm(std::string_view name);
CipherMode parse_cipher_mode(std::string_view name);
IvGenerator parse_iv_generator(std::string_view name);
const char* cipher_algorithm_name(CipherAlgorithm algorithm) noexcept;
const char* cipher_mode_name(CipherMode mode) noexcept;
const char* iv_generator_name(IvGenerator iv) noexcept;

// Throws EINVAL where essiv is asked for with a hash that makes no AES key.
void check_cipher(const CipherSpec& spec);

}  // namespace minivmm::block::crypto
