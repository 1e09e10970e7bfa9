// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/cipher_spec.h"

#include <cerrno>
#include <span>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::block::crypto {
namespace {

using base::Error;

// Each in the order of its enumeration.
constexpr const char* kAlgorithms[] = {"aes-128", "aes-192", "aes-256"};
constexpr size_t kAesKey[] = {16, 24, 32};
constexpr const char* kModes[] = {"xts", "cbc"};
constexpr const char* kIvGenerators[] = {"plain", "plain64", "essiv"};

size_t find(std::span<const char* const> names, std::string_view name, const char* what) {
  std::string list;
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) return i;
    list += fmt::format("{}{}", list.empty() ? "" : ", ", names[i]);
  }
  throw Error(ENOTSUP,
              fmt::format("the {} '{}' is not supported; there are: {}", what, name, list));
}

CipherAlgorithm algorithm_of(size_t aes_key, size_t key_bytes) {
  for (size_t i = 0; i < std::size(kAesKey); ++i) {
    if (kAesKey[i] == aes_key) return static_cast<CipherAlgorithm>(i);
  }
  throw Error(EINVAL, fmt::format("a key of {} bytes fits no AES cipher of this mode", key_bytes));
}

}  // namespace

size_t CipherSpec::key_size() const noexcept {
  return kAesKey[static_cast<size_t>(algorithm)] * (mode == CipherMode::kXts ? 2 : 1);
}

CipherAlgorithm parse_cipher_algorithm(std::string_view name) {
  return static_cast<CipherAlgorithm>(find(kAlgorithms, name, "cipher"));
}
CipherMode parse_cipher_mode(std::string_view name) {
  return static_cast<CipherMode>(find(kModes, name, "cipher mode"));
}
IvGenerator parse_iv_generator(std::string_view name) {
  return static_cast<IvGenerator>(find(kIvGenerators, name, "IV generator"));
}
const char* cipher_algorithm_name(CipherAlgorithm algorithm) noexcept {
  return kAlgorithms[static_cast<size_t>(algorithm)];
}
const char* cipher_mode_name(CipherMode mode) noexcept { return kModes[static_cast<size_t>(mode)]; }
const char* iv_generator_name(IvGenerator iv) noexcept {
  return kIvGenerators[static_cast<size_t>(iv)];
}

CipherSpec cipher_from_luks(std::string_view name, std::string_view mode, size_t key_bytes) {
  if (name != kLuksCipherName) {
    throw Error(ENOTSUP, fmt::format("the cipher '{}' is not supported; there is: aes", name));
  }
  CipherSpec out;
  const size_t dash = mode.find('-');
  out.mode = parse_cipher_mode(mode.substr(0, dash));
  if (dash == std::string_view::npos) {
    throw Error(ENOTSUP, fmt::format("the cipher mode '{}' without an IV generator is not "
                                     "supported",
                                     mode));
  }
  const std::string_view iv = mode.substr(dash + 1);
  const size_t colon = iv.find(':');
  out.iv = parse_iv_generator(iv.substr(0, colon));
  // QEMU also records a hash where the generator has no use for it.
  if (out.iv == IvGenerator::kEssiv) {
    if (colon == std::string_view::npos) {
      throw Error(EINVAL, fmt::format("the cipher mode '{}' lacks the hash of essiv", mode));
    }
    out.iv_hash = parse_hash(iv.substr(colon + 1));
  }
  const bool xts = out.mode == CipherMode::kXts;
  out.algorithm = algorithm_of(xts && key_bytes % 2 == 0 ? key_bytes / 2
                               : xts                     ? 0
                                                         : key_bytes,
                               key_bytes);
  check_cipher(out);
  return out;
}

std::string luks_cipher_mode(const CipherSpec& spec) {
  std::string out = fmt::format("{}-{}", cipher_mode_name(spec.mode), iv_generator_name(spec.iv));
  if (spec.iv == IvGenerator::kEssiv) out += fmt::format(":{}", hash_name(spec.iv_hash));
  return out;
}

void check_cipher(const CipherSpec& spec) {
  if (spec.iv != IvGenerator::kEssiv) return;
  const size_t size = digest_size(spec.iv_hash);
  if (size == 16 || size == 24 || size == 32) return;
  throw Error(EINVAL, fmt::format("essiv with {} is not possible: its {} bytes are no AES key (use "
                                  "sha256)",
                                  hash_name(spec.iv_hash), size));
}

}  // namespace minivmm::block::crypto
