// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/hash.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/gnutls.h"
#include "block/crypto/secure_bytes.h"

namespace minivmm::block::crypto {
namespace {

struct HashFacts {
  const char* name;
  size_t size;
  gnutls_digest_algorithm_t digest;
  gnutls_mac_algorithm_t mac;
};

// In the order of Hash.
constexpr HashFacts kHashes[] = {
    {"sha1", 20, GNUTLS_DIG_SHA1, GNUTLS_MAC_SHA1},
    {"sha224", 28, GNUTLS_DIG_SHA224, GNUTLS_MAC_SHA224},
    {"sha256", 32, GNUTLS_DIG_SHA256, GNUTLS_MAC_SHA256},
    {"sha384", 48, GNUTLS_DIG_SHA384, GNUTLS_MAC_SHA384},
    {"sha512", 64, GNUTLS_DIG_SHA512, GNUTLS_MAC_SHA512},
    {"ripemd160", 20, GNUTLS_DIG_RMD160, GNUTLS_MAC_RMD160},
};

const HashFacts& facts_of(Hash hash) noexcept { return kHashes[static_cast<size_t>(hash)]; }

gnutls_hash_hd_t native(void* handle) noexcept { return static_cast<gnutls_hash_hd_t>(handle); }

}  // namespace

Hash parse_hash(std::string_view name) {
  std::string list;
  for (size_t i = 0; i < std::size(kHashes); ++i) {
    if (kHashes[i].name == name) return static_cast<Hash>(i);
    list += fmt::format("{}{}", list.empty() ? "" : ", ", kHashes[i].name);
  }
  throw base::Error(ENOTSUP,
                    fmt::format("the hash '{}' is not supported; there are: {}", name, list));
}

const char* hash_name(Hash hash) noexcept { return facts_of(hash).name; }
size_t digest_size(Hash hash) noexcept { return facts_of(hash).size; }
int gnutls_mac_of(Hash hash) noexcept { return facts_of(hash).mac; }

void require_hash(Hash hash, int status) {
  if (status >= 0) return;
  throw base::Error(ENOTSUP,
                    fmt::format("the hash '{}' is not supported by the installed GnuTLS: {}",
                                hash_name(hash), gnutls().strerror(status)));
}

namespace {

// Asks by a hash of nothing, once: gnutls_hash_init() leaks when it refuses.
void require_available(Hash hash) {
  static std::array<std::atomic<bool>, std::size(kHashes)> available{};
  std::atomic<bool>& known = available[static_cast<size_t>(hash)];
  if (known.load(std::memory_order_relaxed)) return;
  std::array<std::byte, kMaxDigest> digest;
  require_hash(hash, gnutls().hash_fast(facts_of(hash).digest, "", 0, digest.data()));
  known.store(true, std::memory_order_relaxed);
}

}  // namespace

Hasher::Hasher(Hash hash) : digest_size_(digest_size(hash)) {
  require_available(hash);
  gnutls_hash_hd_t handle = nullptr;
  require_hash(hash, gnutls().hash_init(&handle, facts_of(hash).digest));
  handle_ = handle;
}

Hasher::~Hasher() { gnutls().hash_deinit(native(handle_), nullptr); }

void Hasher::add(std::span<const std::byte> bytes) {
  require_success(gnutls().hash(native(handle_), bytes.data(), bytes.size()), "hash");
}

void Hasher::finish(std::span<std::byte> out) {
  std::array<std::byte, kMaxDigest> digest;
  gnutls().hash_output(native(handle_), digest.data());
  std::memcpy(out.data(), digest.data(), std::min(out.size(), digest_size_));
  wipe(digest);
}

}  // namespace minivmm::block::crypto
