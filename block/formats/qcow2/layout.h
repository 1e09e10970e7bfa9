// SPDX-License-Identifier: Apache-2.0
// The qcow2 format's constants, sizes and table entries. Pure: numbers in, numbers out.
//
//   L1 entry      63 COPIED | 9-55 offset of an L2 table
//   L2 entry      see l2_entry.h
//   refcount table entry   9-63 offset of a refcount block
//
// All numbers in the file are big-endian; the ones here are the host's.
#pragma once

#include <cstdint>

namespace minivmm::block::qcow2 {

inline constexpr uint32_t kMagic = 0x514649fb;
inline constexpr unsigned kMinClusterBits = 9;
inline constexpr unsigned kMaxClusterBits = 21;
// With extended L2 entries a cluster has 32 subclusters, each of at least the smallest cluster.
inline constexpr unsigned kSubclusterBits = 5;
inline constexpr unsigned kMinExtendedClusterBits = kMinClusterBits + kSubclusterBits;
inline constexpr unsigned kMaxRefcountOrder = 6;
// What QEMU accepts; they bound what an image can make us allocate.
inline constexpr uint64_t kMaxL1Bytes = 32ULL << 20;
inline constexpr uint64_t kMaxRefcountTableBytes = 8ULL << 20;
inline constexpr uint32_t kMaxSnapshots = 65536;
inline constexpr uint32_t kMaxBackingNameBytes = 1023;

inline constexpr uint64_t kFlagCopied = 1ULL << 63;
inline constexpr uint64_t kFlagCompressed = 1ULL << 62;
inline constexpr uint64_t kFlagZero = 1;
inline constexpr uint64_t kOffsetMask = 0x00ff'ffff'ffff'fe00ULL;
inline constexpr uint64_t kRefcountOffsetMask = ~uint64_t{0x1ff};
// Metadata and data lie below this (bits 9 to 55 of an entry).
inline constexpr uint64_t kMaxHostOffset = 1ULL << 56;

inline constexpr uint64_t kIncompatDirty = 1;
inline constexpr uint64_t kIncompatCorrupt = 2;
inline constexpr uint64_t kIncompatDataFile = 4;
inline constexpr uint64_t kIncompatCompression = 8;
inline constexpr uint64_t kIncompatExtendedL2 = 16;
inline constexpr uint64_t kIncompatKnown = 31;
inline constexpr uint64_t kCompatLazyRefcounts = 1;
inline constexpr uint64_t kAutoclearBitmaps = 1;
inline constexpr uint64_t kAutoclearRawData = 2;

enum class Compression : uint8_t { kZlib = 0, kZstd = 1 };

// The sizes that follow from a header. A subcluster is what an L2 entry can speak of by itself: a
// 32nd of a cluster where the image has extended L2 entries, else the cluster.
struct Geometry {
  unsigned cluster_bits = 16;
  unsigned refcount_order = 4;
  unsigned version = 3;
  bool extended_l2 = false;
  bool external_data = false;  // guest data lies in another file, where the guest has it

  uint64_t cluster_size() const noexcept { return 1ULL << cluster_bits; }
  uint64_t offset_in_cluster(uint64_t offset) const noexcept {
    return offset & (cluster_size() - 1);
  }
  uint64_t clusters(uint64_t bytes) const noexcept {
    return (bytes >> cluster_bits) + (offset_in_cluster(bytes) != 0 ? 1 : 0);
  }
  unsigned subclusters() const noexcept { return extended_l2 ? 1U << kSubclusterBits : 1; }
  unsigned subcluster_bits() const noexcept {
    return extended_l2 ? cluster_bits - kSubclusterBits : cluster_bits;
  }
  uint64_t subcluster_size() const noexcept { return 1ULL << subcluster_bits(); }
  uint32_t all_subclusters() const noexcept { return extended_l2 ? ~uint32_t{0} : 1; }
  // Which subcluster of its cluster an offset lies in.
  unsigned subcluster(uint64_t offset) const noexcept {
    return static_cast<unsigned>(offset_in_cluster(offset) >> subcluster_bits());
  }
  // Bytes of an L2 entry; entries of an L2 table, and how much of the disk one table describes.
  unsigned l2_entry_bytes() const noexcept { return extended_l2 ? 16 : 8; }
  unsigned l2_bits() const noexcept { return cluster_bits - (extended_l2 ? 4 : 3); }
  uint64_t l2_entries() const noexcept { return 1ULL << l2_bits(); }
  unsigned l1_shift() const noexcept { return cluster_bits + l2_bits(); }
  // Entries of a refcount block.
  unsigned block_bits() const noexcept { return cluster_bits + 3 - refcount_order; }
  uint64_t block_entries() const noexcept { return 1ULL << block_bits(); }
  uint64_t refcount_max() const noexcept {
    return refcount_order == 6 ? ~uint64_t{0} : (1ULL << (1U << refcount_order)) - 1;
  }
};

// Why an L1 entry is invalid, or nullptr.
const char* l1_problem(uint64_t raw, const Geometry& geometry) noexcept;
const char* refcount_table_problem(uint64_t raw, const Geometry& geometry) noexcept;

}  // namespace minivmm::block::qcow2
