// SPDX-License-Identifier: Apache-2.0
// The LUKS version 1 header. Pure: bytes in, values out. All integers are big-endian, offsets in
// sectors of 512 bytes from the beginning of the header, strings end with a zero byte.
//
//   0    magic "LUKS\xba\xbe"       104  u32 payload-offset       168  uuid[40]
//   6    u16 version                108  u32 key-bytes            208  8 key slots of 48 bytes:
//   8    cipher-name[32]            112  mk-digest[20]              +0   u32 active
//   40   cipher-mode[32]            132  mk-digest-salt[32]         +4   u32 iterations
//   72   hash-spec[32]              164  u32 mk-digest-iterations   +8   salt[32]
//                                                                   +40  u32 key-material-offset
//                                                                   +44  u32 stripes
// The header may be hostile: whatever is accepted here is bounded, except the iteration counts,
// which only who unlocks can judge (luks1_unlock.h).
#pragma once

#include <string>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "block/crypto/cipher_spec.h"
#include "block/crypto/hash.h"

namespace minivmm::block::crypto {

inline constexpr size_t kLuks1HeaderSize = 592;
inline constexpr size_t kLuks1Slots = 8;
inline constexpr size_t kLuks1SlotAt = 208;
inline constexpr size_t kLuks1SlotSize = 48;
inline constexpr size_t kLuksSalt = 32;
inline constexpr size_t kLuksDigest = 20;
inline constexpr uint32_t kLuksSlotActive = 0x00ac71f3;
inline constexpr uint32_t kLuksSlotInactive = 0x0000dead;
// What everybody writes, and QEMU insists on.
inline constexpr uint32_t kLuksStripes = 4000;
// With the largest key, 1 MiB of key material a slot.
inline constexpr uint32_t kLuksMaxStripes = 16384;

using LuksSalt = std::array<std::byte, kLuksSalt>;

struct Luks1Slot {
  bool active = false;
  uint32_t iterations = 0;  // at least 1 if active
  LuksSalt salt{};
  uint32_t material_sector = 0;
  uint32_t stripes = 0;  // 1 to kLuksMaxStripes

  uint64_t material_offset() const noexcept { return uint64_t{material_sector} * kSectorSize; }
};

struct Luks1Header {
  CipherSpec cipher;
  Hash hash = Hash::kSha256;  // of PBKDF2 and of the anti-forensic split
  uint32_t payload_sector = 0;
  std::array<std::byte, kLuksDigest> mk_digest{};
  LuksSalt mk_salt{};
  uint32_t mk_iterations = 0;  // at least 1
  std::string uuid;
  std::array<Luks1Slot, kLuks1Slots> slots;
  std::string cipher_mode;  // as it stands in the header

  uint64_t payload_offset() const noexcept { return uint64_t{payload_sector} * kSectorSize; }
  size_t key_size() const noexcept { return cipher.key_size(); }
  // Of a slot, in whole sectors.
  size_t material_size(const Luks1Slot& slot) const noexcept;
  size_t active_slots() const noexcept;
};

// True for the first bytes of a LUKS header, of any version.
bool looks_like_luks(std::span<const std::byte> bytes) noexcept;

// Throws EINVAL for what is no header or a wrong one, ENOTSUP for a version, cipher or hash that
// there is not, by name.
Luks1Header parse_luks1(std::span<const std::byte> bytes);

// How a header lies in what holds it.
struct LuksPlace {
  // Bytes from the beginning of the header to the end of what holds it: a file's size; in qcow2
  // the length that the header extension states.
  uint64_t size = 0;
  // False where the payload is not behind the header (qcow2): payload-offset is then not looked at
  // beyond being behind the key material.
  bool holds_payload = true;
};

// Key material and payload lie within `place`, behind the header, and do not overlap. Throws EINVAL
// naming the slot.
void check_luks1_place(const Luks1Header& header, const LuksPlace& place);

using Luks1Bytes = std::array<std::byte, kLuks1HeaderSize>;
Luks1Bytes encode_luks1(const Luks1Header& header);

}  // namespace minivmm::block::crypto
