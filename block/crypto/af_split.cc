// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/af_split.h"

#include <algorithm>
#include <array>

#include "base/bytes.h"
#include "block/crypto/kdf.h"

namespace minivmm::block::crypto {
namespace {

void xor_into(std::span<std::byte> to, std::span<const std::byte> from) noexcept {
  for (size_t i = 0; i < to.size(); ++i) to[i] ^= from[i];
}

// Each piece of a digest's size, the last one perhaps shorter, becomes the hash of its number and
// itself.
void diffuse(Hasher& hasher, size_t digest, std::span<std::byte> block) {
  std::array<std::byte, 4> number;
  for (size_t at = 0, i = 0; at < block.size(); at += digest, ++i) {
    base::store_be<uint32_t>(number.data(), static_cast<uint32_t>(i));
    const auto piece = block.subspan(at, std::min(digest, block.size() - at));
    hasher.add(number);
    hasher.add(piece);
    hasher.finish(piece);
  }
}

// What all stripes but the last make of zeroes.
void fold(Hash hash, std::span<const std::byte> material, uint32_t stripes,
          std::span<std::byte> block) {
  Hasher hasher(hash);
  const size_t digest = digest_size(hash);
  for (uint32_t i = 0; i + 1 < stripes; ++i) {
    xor_into(block, material.subspan(i * block.size(), block.size()));
    diffuse(hasher, digest, block);
  }
}

}  // namespace

void af_split(Hash hash, std::span<const std::byte> key, uint32_t stripes,
              std::span<std::byte> material) {
  const auto last = material.subspan((stripes - 1) * key.size(), key.size());
  const auto others = material.first((stripes - 1) * key.size());
  if (!others.empty()) fill_random(others);
  SecureBytes block(key.size());
  fold(hash, material, stripes, block.span());
  xor_into(block.span(), key);
  std::copy(block.span().begin(), block.span().end(), last.begin());
}

SecureBytes af_merge(Hash hash, std::span<const std::byte> material, uint32_t stripes,
                     size_t key_size) {
  SecureBytes block(key_size);
  fold(hash, material, stripes, block.span());
  xor_into(block.span(), material.subspan((stripes - 1) * key_size, key_size));
  return block;
}

}  // namespace minivmm::block::crypto
