// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/tables.h"

#include <algorithm>

#include "base/bytes.h"

namespace minivmm::block::qcow2 {

using base::load_be;

SnapshotEntry decode_snapshot_sizes(std::span<const std::byte> bytes) {
  const std::byte* p = bytes.data();
  SnapshotEntry out;
  out.l1_offset = load_be<uint64_t>(p);
  out.l1_size = load_be<uint32_t>(p + 8);
  out.id_bytes = load_be<uint16_t>(p + 12);
  out.name_bytes = load_be<uint16_t>(p + 14);
  out.date_seconds = load_be<uint32_t>(p + 16);
  out.date_nanoseconds = load_be<uint32_t>(p + 20);
  out.vm_clock_nanoseconds = load_be<uint64_t>(p + 24);
  out.vm_state_bytes = load_be<uint32_t>(p + 32);
  out.extra_bytes = load_be<uint32_t>(p + 36);
  return out;
}

void decode_snapshot_rest(std::span<const std::byte> bytes, SnapshotEntry& entry) {
  const std::byte* extra = bytes.data() + kSnapshotFixedBytes;
  if (entry.extra_bytes >= 8) entry.vm_state_bytes = load_be<uint64_t>(extra);
  if (entry.extra_bytes >= 16) entry.disk_size = load_be<uint64_t>(extra + 8);
  if (entry.extra_bytes >= 24) {
    const auto count = load_be<uint64_t>(extra + 16);
    if (count != ~uint64_t{0}) entry.instructions = count;
  }
  entry.extra.assign(extra, extra + entry.extra_bytes);
  // SAFETY: bytes as characters.
  const char* text = reinterpret_cast<const char*>(extra + entry.extra_bytes);
  entry.id.assign(text, entry.id_bytes);
  entry.name.assign(text + entry.id_bytes, entry.name_bytes);
}

std::vector<std::byte> encode_snapshot(const SnapshotEntry& entry) {
  const size_t bytes =
      kSnapshotFixedBytes + entry.extra.size() + entry.id.size() + entry.name.size();
  std::vector<std::byte> out((bytes + 7) & ~size_t{7});
  std::byte* p = out.data();
  base::store_be(p, entry.l1_offset);
  base::store_be(p + 8, entry.l1_size);
  base::store_be(p + 12, static_cast<uint16_t>(entry.id.size()));
  base::store_be(p + 14, static_cast<uint16_t>(entry.name.size()));
  base::store_be(p + 16, entry.date_seconds);
  base::store_be(p + 20, entry.date_nanoseconds);
  base::store_be(p + 24, entry.vm_clock_nanoseconds);
  // Larger ones are in the extra data.
  const bool fits = entry.vm_state_bytes <= ~uint32_t{0};
  base::store_be(p + 32, fits ? static_cast<uint32_t>(entry.vm_state_bytes) : 0);
  base::store_be(p + 36, static_cast<uint32_t>(entry.extra.size()));
  std::byte* at = std::copy(entry.extra.begin(), entry.extra.end(), p + kSnapshotFixedBytes);
  const auto id = std::as_bytes(std::span(entry.id));
  at = std::copy(id.begin(), id.end(), at);
  const auto name = std::as_bytes(std::span(entry.name));
  std::copy(name.begin(), name.end(), at);
  return out;
}

std::vector<std::byte> snapshot_extra(uint64_t vm_state_bytes, uint64_t disk_size) {
  std::vector<std::byte> out(24);
  base::store_be(out.data(), vm_state_bytes);
  base::store_be(out.data() + 8, disk_size);
  return out;
}

BitmapEntry decode_bitmap(std::span<const std::byte> bytes) {
  const std::byte* p = bytes.data();
  BitmapEntry out;
  out.table_offset = load_be<uint64_t>(p);
  out.table_size = load_be<uint32_t>(p + 8);
  out.flags = load_be<uint32_t>(p + 12);
  out.type = static_cast<uint8_t>(p[16]);
  out.granularity_bits = static_cast<uint8_t>(p[17]);
  out.name_bytes = load_be<uint16_t>(p + 18);
  out.extra_bytes = load_be<uint32_t>(p + 20);
  return out;
}

void decode_bitmap_name(std::span<const std::byte> bytes, BitmapEntry& entry) {
  const std::byte* extra = bytes.data() + kBitmapFixedBytes;
  entry.extra.assign(extra, extra + entry.extra_bytes);
  // SAFETY: bytes as characters.
  entry.name.assign(reinterpret_cast<const char*>(extra + entry.extra_bytes), entry.name_bytes);
}

std::vector<std::byte> encode_bitmap(const BitmapEntry& entry) {
  const size_t bytes = kBitmapFixedBytes + entry.extra.size() + entry.name.size();
  std::vector<std::byte> out((bytes + 7) & ~size_t{7});
  std::byte* p = out.data();
  base::store_be(p, entry.table_offset);
  base::store_be(p + 8, entry.table_size);
  base::store_be(p + kBitmapFlagsField, entry.flags);
  p[16] = std::byte{entry.type};
  p[17] = std::byte{entry.granularity_bits};
  base::store_be(p + 18, static_cast<uint16_t>(entry.name.size()));
  base::store_be(p + 20, static_cast<uint32_t>(entry.extra.size()));
  std::byte* const end = std::copy(entry.extra.begin(), entry.extra.end(), p + kBitmapFixedBytes);
  const auto name = std::as_bytes(std::span(entry.name));
  std::copy(name.begin(), name.end(), end);
  return out;
}

}  // namespace minivmm::block::qcow2
