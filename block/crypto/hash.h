// SPDX-License-Identifier: Apache-2.0
// Hashes, by the names that LUKS headers and QEMU's options have for them.
#pragma once

#include <string>
#include <string_view>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace minivmm::block::crypto {

enum class Hash : uint8_t { kSha1, kSha224, kSha256, kSha384, kSha512, kRipemd160 };

inline constexpr size_t kMaxDigest = 64;

// Throws ENOTSUP naming the hash and those that there are. (Whether the installed GnuTLS has it is
// found when it is used: 3.7 has no ripemd160.)
Hash parse_hash(std::string_view name);
const char* hash_name(Hash hash) noexcept;
size_t digest_size(Hash hash) noexcept;  // bytes
// Throws ENOTSUP naming the hash if `status` is GnuTLS's error of beginning to use it.
void require_hash(Hash hash, int status);
int gnutls_mac_of(Hash hash) noexcept;  // gnutls_mac_algorithm_t, of its HMAC

// One computation after another with the same hash. One thread at a time. Throws ENOTSUP naming
// the hash where GnuTLS lacks it, or GnuTLS is not there.
class Hasher {
 public:
  explicit Hasher(Hash hash);
  Hasher(const Hasher&) = delete;
  Hasher& operator=(const Hasher&) = delete;
  ~Hasher();

  void add(std::span<const std::byte> bytes);
  // The digest, and a new beginning. `out` takes the first out.size() bytes of it.
  void finish(std::span<std::byte> out);

 private:
  const size_t digest_size_;
  void* handle_ = nullptr;  // a gnutls_hash_hd_t
};

}  // namespace minivmm::block::crypto
