// SPDX-License-Identifier: Apache-2.0
// Entries of the snapshot table and of the bitmap directory. Pure: bytes in, values out. Both are
// sequences of entries of variable length; a decoder says how long its entry is.
#pragma once

#include <string>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace minivmm::block::qcow2 {

inline constexpr size_t kSnapshotFixedBytes = 40;
inline constexpr size_t kBitmapFixedBytes = 24;
// What QEMU accepts.
inline constexpr uint32_t kMaxSnapshotExtraBytes = 1024;
inline constexpr uint32_t kMaxBitmapNameBytes = 1023;

struct SnapshotEntry {
  uint64_t l1_offset = 0;
  uint32_t l1_size = 0;  // entries
  uint16_t id_bytes = 0;
  uint16_t name_bytes = 0;
  uint32_t extra_bytes = 0;
  uint64_t vm_state_bytes = 0;
  uint64_t disk_size = 0;     // 0: not recorded
  uint32_t date_seconds = 0;  // since the epoch
  uint32_t date_nanoseconds = 0;
  uint64_t vm_clock_nanoseconds = 0;     // how long the guest had run
  std::optional<uint64_t> instructions;  // that it had executed, where they were counted
  std::vector<std::byte> extra;          // as it is in the image, with fields that are not known
  std::string id;
  std::string name;
  // The whole entry with its padding.
  uint64_t total_bytes() const noexcept {
    return (kSnapshotFixedBytes + uint64_t{extra_bytes} + id_bytes + name_bytes + 7) & ~7ULL;
  }
};

// From the fixed part; gives total_bytes(). `bytes` holds kSnapshotFixedBytes.
SnapshotEntry decode_snapshot_sizes(std::span<const std::byte> bytes);
// The rest, from the whole entry (total_bytes() long, or less the padding).
void decode_snapshot_rest(std::span<const std::byte> bytes, SnapshotEntry& entry);
// total_bytes() of them; the sizes are those of the id, the name and the extra data, which is
// written as it is.
std::vector<std::byte> encode_snapshot(const SnapshotEntry& entry);
// The extra data of a new snapshot.
std::vector<std::byte> snapshot_extra(uint64_t vm_state_bytes, uint64_t disk_size);

// Of its id and of its name; an entry's length fields hold no more.
inline constexpr size_t kMaxSnapshotNameBytes = 65535;

inline constexpr uint32_t kBitmapInUse = 1;
inline constexpr uint32_t kBitmapAuto = 2;
inline constexpr uint32_t kBitmapExtraCompatible = 4;
inline constexpr uint8_t kDirtyTracking = 1;  // the only type
inline constexpr unsigned kMinBitmapGranularityBits = 9;
inline constexpr unsigned kMaxBitmapGranularityBits = 31;
inline constexpr uint64_t kBitmapFlagsField = 12;  // in an entry, 4 bytes
// What QEMU accepts of a bitmap's data.
inline constexpr uint64_t kMaxBitmapBytes = 512ULL << 20;

struct BitmapEntry {
  uint64_t table_offset = 0;
  uint32_t table_size = 0;  // entries
  uint32_t flags = 0;
  uint8_t type = 0;
  uint8_t granularity_bits = 0;
  uint16_t name_bytes = 0;
  uint32_t extra_bytes = 0;
  std::vector<std::byte> extra;  // of a meaning that is not known
  std::string name;
  // The whole entry with its padding.
  uint64_t total_bytes() const noexcept {
    return (kBitmapFixedBytes + uint64_t{extra_bytes} + name_bytes + 7) & ~7ULL;
  }
};

// As for snapshots: from the fixed part, and from the whole entry.
BitmapEntry decode_bitmap(std::span<const std::byte> bytes);
void decode_bitmap_name(std::span<const std::byte> bytes, BitmapEntry& entry);
// total_bytes() of them; the sizes are those of the name and the extra data.
std::vector<std::byte> encode_bitmap(const BitmapEntry& entry);

}  // namespace minivmm::block::qcow2
