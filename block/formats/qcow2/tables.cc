// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/tables.h"

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
  // SAFETY: bytes as characters.
  const char* text = reinterpret_cast<const char*>(extra + entry.extra_bytes);
  entry.id.assign(text, entry.id_bytes);
  entry.name.assign(text + entry.id_bytes, entry.name_bytes);
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
  // SAFETY: bytes as characters.
  const char* text =
      reinterpret_cast<const char*>(bytes.data() + kBitmapFixedBytes + entry.extra_bytes);
  entry.name.assign(text, entry.name_bytes);
}

}  // namespace minivmm::block::qcow2
