// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/luks1_unlock.h"

#include <string>

#include <algorithm>
#include <array>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/af_split.h"
#include "block/crypto/kdf.h"
#include "block/crypto/sector_cipher.h"

namespace minivmm::block::crypto {
namespace {

using base::Error;
using Seconds = std::chrono::duration<double>;

// Of trying a slot: its own key, and the digest of what comes out.
Seconds cost_of(const KdfSpeed& speed, const Luks1Header& header, const Luks1Slot& slot) {
  return speed.time_of(slot.iterations, header.key_size()) +
         speed.time_of(header.mk_iterations, kLuksDigest);
}

Error too_slow(const Luks1Header& header, size_t slot, Seconds cost, Seconds limit) {
  return {ETIME,
          fmt::format("key slot {} asks for {} iterations of PBKDF2 (and {} for the digest), "
                      "about {:.0f} s on this machine; the limit is {:.3g} s for all slots: "
                      "raise the option 'unlock-time' if the image is to be trusted",
                      slot, header.slots[slot].iterations, header.mk_iterations, cost.count(),
                      limit.count())};
}

bool has_digest(const Luks1Header& header, const SecureBytes& key) {
  std::array<std::byte, kLuksDigest> digest;
  pbkdf2(header.hash, key.span(), header.mk_salt, header.mk_iterations, digest);
  return same_bytes(digest, header.mk_digest);
}

// Not on a fiber. `material` is decrypted in place.
std::optional<SecureBytes> open_slot(const Luks1Header& header, const Luks1Slot& slot,
                                     std::span<const std::byte> password,
                                     std::span<std::byte> material) {
  SecureBytes slot_key(header.key_size());
  pbkdf2(header.hash, password, slot.salt, slot.iterations, slot_key.span());
  // The sectors of key material are numbered from its beginning.
  SectorCipher(header.cipher, slot_key.span()).decrypt(0, material);
  SecureBytes master = af_merge(header.hash, material, slot.stripes, header.key_size());
  if (!has_digest(header, master)) return std::nullopt;
  return master;
}

std::optional<SecureBytes> read_and_open(LuksArea& area, const Luks1Header& header, size_t number,
                                         std::span<const std::byte> password) {
  const Luks1Slot& slot = header.slots[number];
  SecureBytes material(header.material_size(slot));
  area.read(slot.material_offset(), material.span());
  return key_pool().run([&] { return open_slot(header, slot, password, material.span()); });
}

KdfSpeed measure(Hash hash) {
  return key_pool().run([&] { return KdfSpeed(hash, KdfSpeed::Precision::kRough); });
}

}  // namespace

Luks1Header read_luks1(LuksArea& area, bool holds_payload) {
  std::array<std::byte, kLuks1HeaderSize> bytes{};
  const size_t there = std::min<uint64_t>(area.size(), bytes.size());
  area.read(0, std::span(bytes).first(there));
  Luks1Header header = parse_luks1(std::span(bytes).first(there));
  check_luks1_place(header, {area.size(), holds_payload});
  return header;
}

Luks1Key unlock_luks1(LuksArea& area, const Luks1Header& header,
                      std::span<const std::byte> password, std::chrono::milliseconds limit) {
  if (header.active_slots() == 0) {
    throw Error(EACCES,
                "every key slot was erased: what the image holds cannot be decrypted by "
                "anybody");
  }
  const KdfSpeed speed = measure(header.hash);
  Seconds left = limit;
  std::optional<Error> skipped;
  for (size_t i = 0; i < kLuks1Slots; ++i) {
    if (!header.slots[i].active) continue;
    const Seconds cost = cost_of(speed, header, header.slots[i]);
    if (cost > left) {
      if (!skipped) skipped = too_slow(header, i, cost, limit);
      continue;
    }
    left -= cost;
    if (auto master = read_and_open(area, header, i, password)) return {std::move(*master), i};
  }
  if (skipped) throw *skipped;
  throw Error(EACCES, "Invalid password, cannot unlock any keyslot");
}

std::optional<SecureBytes> try_slot(LuksArea& area, const Luks1Header& header, size_t slot,
                                    std::span<const std::byte> password,
                                    std::chrono::milliseconds limit) {
  const Seconds cost = cost_of(measure(header.hash), header, header.slots[slot]);
  if (cost > limit) throw too_slow(header, slot, cost, limit);
  return read_and_open(area, header, slot, password);
}

}  // namespace minivmm::block::crypto
