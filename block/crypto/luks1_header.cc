// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/luks1_header.h"

#include <string_view>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/checked.h"
#include "base/error.h"

namespace minivmm::block::crypto {
namespace {

using base::Error;
using base::load_be;
using base::store_be;

constexpr std::string_view kMagic("LUKS\xba\xbe", 6);
constexpr size_t kVersionAt = 6;
constexpr size_t kCipherNameAt = 8;
constexpr size_t kCipherModeAt = 40;
constexpr size_t kHashSpecAt = 72;
constexpr size_t kNameSize = 32;
constexpr size_t kPayloadAt = 104;
constexpr size_t kKeyBytesAt = 108;
constexpr size_t kDigestAt = 112;
constexpr size_t kDigestSaltAt = 132;
constexpr size_t kDigestIterationsAt = 164;
constexpr size_t kUuidAt = 168;
constexpr size_t kUuidSize = 40;

std::string take_text(std::span<const std::byte> bytes, size_t at, size_t size, const char* what) {
  // SAFETY: octets as characters.
  const std::string_view field(reinterpret_cast<const char*>(bytes.data()) + at, size);
  const size_t end = field.find('\0');
  if (end == std::string_view::npos) {
    throw Error(EINVAL, fmt::format("the LUKS header's {} has no end", what));
  }
  const std::string_view text = field.substr(0, end);
  // It goes into messages.
  if (!std::all_of(text.begin(), text.end(), [](char c) { return c > ' ' && c < '\x7f'; })) {
    throw Error(EINVAL, fmt::format("the LUKS header's {} is no text", what));
  }
  return std::string(text);
}

void require_version_1(std::span<const std::byte> bytes) {
  if (!looks_like_luks(bytes)) throw Error(EINVAL, "there is no LUKS header");
  const auto version = load_be<uint16_t>(bytes.data() + kVersionAt);
  if (version == 1) return;
  if (version == 2) {
    throw Error(ENOTSUP,
                "the LUKS header has version 2 (LUKS2), which is not supported, version 1 is: "
                "`cryptsetup convert --type luks1` may convert it");
  }
  throw Error(ENOTSUP, fmt::format("the LUKS header has the unknown version {}", version));
}

Luks1Slot parse_slot(std::span<const std::byte> bytes, size_t number) {
  const std::byte* at = bytes.data() + kLuks1SlotAt + number * kLuks1SlotSize;
  Luks1Slot out;
  const auto state = load_be<uint32_t>(at);
  if (state != kLuksSlotActive && state != kLuksSlotInactive) {
    throw Error(EINVAL,
                fmt::format("key slot {} is neither active nor inactive ({:#x})", number, state));
  }
  out.active = state == kLuksSlotActive;
  out.iterations = load_be<uint32_t>(at + 4);
  std::memcpy(out.salt.data(), at + 8, kLuksSalt);
  out.material_sector = load_be<uint32_t>(at + 40);
  out.stripes = load_be<uint32_t>(at + 44);
  if (out.active && out.iterations == 0) {
    throw Error(EINVAL, fmt::format("key slot {} has no iterations", number));
  }
  if (out.stripes == 0 || out.stripes > kLuksMaxStripes) {
    throw Error(EINVAL, fmt::format("key slot {} has {} stripes (1 to {} are possible)", number,
                                    out.stripes, kLuksMaxStripes));
  }
  return out;
}

void put_text(Luks1Bytes& out, size_t at, size_t size, std::string_view text) {
  std::memcpy(out.data() + at, text.data(), std::min(text.size(), size - 1));
}

}  // namespace

bool looks_like_luks(std::span<const std::byte> bytes) noexcept {
  return bytes.size() >= kMagic.size() + 2 &&
         std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) == 0;
}

size_t Luks1Header::material_size(const Luks1Slot& slot) const noexcept {
  return base::align_up<size_t>(key_size() * slot.stripes, kSectorSize);
}

size_t Luks1Header::active_slots() const noexcept {
  return static_cast<size_t>(
      std::count_if(slots.begin(), slots.end(), [](const Luks1Slot& slot) { return slot.active; }));
}

Luks1Header parse_luks1(std::span<const std::byte> bytes) {
  require_version_1(bytes);
  if (bytes.size() < kLuks1HeaderSize) {
    throw Error(EINVAL, fmt::format("the LUKS header is cut off after {} bytes", bytes.size()));
  }
  Luks1Header out;
  const std::string name = take_text(bytes, kCipherNameAt, kNameSize, "cipher name");
  out.cipher_mode = take_text(bytes, kCipherModeAt, kNameSize, "cipher mode");
  const std::string hash = take_text(bytes, kHashSpecAt, kNameSize, "hash");
  out.cipher =
      cipher_from_luks(name, out.cipher_mode, load_be<uint32_t>(bytes.data() + kKeyBytesAt));
  out.hash = parse_hash(hash);
  out.payload_sector = load_be<uint32_t>(bytes.data() + kPayloadAt);
  std::memcpy(out.mk_digest.data(), bytes.data() + kDigestAt, kLuksDigest);
  std::memcpy(out.mk_salt.data(), bytes.data() + kDigestSaltAt, kLuksSalt);
  out.mk_iterations = load_be<uint32_t>(bytes.data() + kDigestIterationsAt);
  if (out.mk_iterations == 0) {
    throw Error(EINVAL, "the LUKS header's digest of the master key has no iterations");
  }
  out.uuid = take_text(bytes, kUuidAt, kUuidSize, "UUID");
  for (size_t i = 0; i < kLuks1Slots; ++i) out.slots[i] = parse_slot(bytes, i);
  return out;
}

void check_luks1_place(const Luks1Header& header, const LuksPlace& place) {
  const uint64_t payload = header.payload_offset();
  if (place.holds_payload && payload == 0) {
    throw Error(ENOTSUP,
                "the LUKS header is a detached one (its payload offset is 0), which is not "
                "supported");
  }
  if (place.holds_payload && payload > place.size) {
    throw Error(EINVAL, fmt::format("the LUKS payload begins at {}, past the end ({} bytes)",
                                    payload, place.size));
  }
  const uint64_t end = place.holds_payload ? payload : place.size;
  struct Area {
    uint64_t begin;
    uint64_t end;
    size_t slot;
  };
  std::array<Area, kLuks1Slots> areas;
  for (size_t i = 0; i < kLuks1Slots; ++i) {
    const Luks1Slot& slot = header.slots[i];
    const uint64_t begin = slot.material_offset();
    areas[i] = {begin, begin + header.material_size(slot), i};
    if (begin < kLuks1HeaderSize) {
      throw Error(EINVAL, fmt::format("the key material of slot {} overlaps the header", i));
    }
    // The last sector of the material may be one that was not written whole.
    if (begin + header.key_size() * slot.stripes > end) {
      throw Error(EINVAL,
                  fmt::format("the key material of slot {} (to {}) reaches past {} ({})", i,
                              areas[i].end, place.holds_payload ? "the payload" : "the end", end));
    }
  }
  std::sort(areas.begin(), areas.end(),
            [](const Area& a, const Area& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < areas.size(); ++i) {
    if (areas[i].begin >= areas[i - 1].end) continue;
    throw Error(EINVAL, fmt::format("the key material of slots {} and {} overlaps",
                                    areas[i - 1].slot, areas[i].slot));
  }
}

Luks1Bytes encode_luks1(const Luks1Header& header) {
  Luks1Bytes out{};
  std::memcpy(out.data(), kMagic.data(), kMagic.size());
  store_be<uint16_t>(out.data() + kVersionAt, 1);
  put_text(out, kCipherNameAt, kNameSize, kLuksCipherName);
  put_text(out, kCipherModeAt, kNameSize, header.cipher_mode);
  put_text(out, kHashSpecAt, kNameSize, hash_name(header.hash));
  store_be<uint32_t>(out.data() + kPayloadAt, header.payload_sector);
  store_be<uint32_t>(out.data() + kKeyBytesAt, static_cast<uint32_t>(header.key_size()));
  std::memcpy(out.data() + kDigestAt, header.mk_digest.data(), kLuksDigest);
  std::memcpy(out.data() + kDigestSaltAt, header.mk_salt.data(), kLuksSalt);
  store_be<uint32_t>(out.data() + kDigestIterationsAt, header.mk_iterations);
  put_text(out, kUuidAt, kUuidSize, header.uuid);
  for (size_t i = 0; i < kLuks1Slots; ++i) {
    const Luks1Slot& slot = header.slots[i];
    std::byte* at = out.data() + kLuks1SlotAt + i * kLuks1SlotSize;
    store_be<uint32_t>(at, slot.active ? kLuksSlotActive : kLuksSlotInactive);
    store_be<uint32_t>(at + 4, slot.iterations);
    std::memcpy(at + 8, slot.salt.data(), kLuksSalt);
    store_be<uint32_t>(at + 40, slot.material_sector);
    store_be<uint32_t>(at + 44, slot.stripes);
  }
  return out;
}

}  // namespace minivmm::block::crypto
