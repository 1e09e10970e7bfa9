// SPDX-License-Identifier: Apache-2.0
// The qcow2 format's constants, sizes and table entries. Pure: numbers in, numbers out.
//
//   L1 entry      63 COPIED | 9-55 offset of an L2 table
//   L2 entry      63 COPIED | 62 COMPRESSED | 9-55 host cluster | 0 ZERO (version 3)
//   compressed    62 set | x-61 further sectors | 0-(x-1) byte offset, x = 62 - (cluster_bits - 8)
//   refcount table entry   9-63 offset of a refcount block
//
// All numbers in the file are big-endian; the ones here are the host's.
#pragma once

#include <string_view>

#include <bit>
#include <cstdint>

namespace minivmm::block::qcow2 {

inline constexpr uint32_t kMagic = 0x514649fb;
inline constexpr unsigned kMinClusterBits = 9;
inline constexpr unsigned kMaxClusterBits = 21;
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

// The sizes that follow from a header.
struct Geometry {
  unsigned cluster_bits = 16;
  unsigned refcount_order = 4;
  unsigned version = 3;

  uint64_t cluster_size() const noexcept { return 1ULL << cluster_bits; }
  uint64_t offset_in_cluster(uint64_t offset) const noexcept {
    return offset & (cluster_size() - 1);
  }
  uint64_t clusters(uint64_t bytes) const noexcept {
    return (bytes >> cluster_bits) + (offset_in_cluster(bytes) != 0 ? 1 : 0);
  }
  // Entries of an L2 table, and how much of the disk one table describes.
  unsigned l2_bits() const noexcept { return cluster_bits - 3; }
  uint64_t l2_entries() const noexcept { return 1ULL << l2_bits(); }
  unsigned l1_shift() const noexcept { return cluster_bits + l2_bits(); }
  // Entries of a refcount block.
  unsigned block_bits() const noexcept { return cluster_bits + 3 - refcount_order; }
  uint64_t block_entries() const noexcept { return 1ULL << block_bits(); }
  uint64_t refcount_max() const noexcept {
    return refcount_order == 6 ? ~uint64_t{0} : (1ULL << (1U << refcount_order)) - 1;
  }
};

enum class ClusterKind : uint8_t {
  kUnallocated,    // the backing file, or zeroes
  kZeroPlain,      // zeroes
  kZeroAllocated,  // zeroes; a host cluster is reserved
  kData,           // a host cluster
  kCompressed,
  kInvalid,  // `problem` says why
};

struct L2Entry {
  ClusterKind kind = ClusterKind::kUnallocated;
  bool copied = false;
  uint64_t host_offset = 0;       // of the cluster, or of the first compressed byte
  uint64_t compressed_bytes = 0;  // at most this many, to the end of the last sector
  const char* problem = nullptr;
};

L2Entry decode_l2(uint64_t raw, const Geometry& geometry) noexcept;

// The host clusters that an entry holds references to: first cluster number and count (0: none).
struct HostClusters {
  uint64_t first = 0;
  uint64_t count = 0;
};
HostClusters clusters_of(const L2Entry& entry, const Geometry& geometry) noexcept;

// Why an L1 entry is invalid, or nullptr.
const char* l1_problem(uint64_t raw, const Geometry& geometry) noexcept;
const char* refcount_table_problem(uint64_t raw, const Geometry& geometry) noexcept;

}  // namespace minivmm::block::qcow2
