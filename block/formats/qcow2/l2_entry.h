// SPDX-License-Identifier: Apache-2.0
// Entries of L2 tables, of 8 and of 16 bytes. Pure: bytes and numbers in, values out.
//
//   entry         63 COPIED | 62 COMPRESSED | 9-55 host cluster | 0 ZERO (version 3, not extended)
//   compressed    62 set | x-61 further sectors | 0-(x-1) byte offset, x = 62 - (cluster_bits - 8)
//                 With an external data file the host cluster is where the guest has it, and may
//                 be 0: COPIED says that it is allocated.
//   bitmap        32-63 the subcluster reads as zeroes | 0-31 the subcluster has data
//                 (extended entries only, behind the entry)
//
// Above this both are one thing: a cluster of 1 or 32 subclusters, each of which has data, is
// zeroes, or is not allocated. So nothing else in the driver asks which of the two an image has.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "base/bytes.h"
#include "block/formats/qcow2/layout.h"

namespace minivmm::block::qcow2 {

// What an entry says of a subcluster (of all of the cluster, if it is compressed or invalid).
enum class ClusterKind : uint8_t {
  kUnallocated,    // the backing file, or zeroes
  kZeroPlain,      // zeroes
  kZeroAllocated,  // zeroes; a place in a host cluster is reserved
  kData,           // in a host cluster
  kCompressed,
  kInvalid,  // `problem` says why
};

// As in the file, in the host's byte order. `bitmap` is 0 where entries have none.
struct RawL2 {
  uint64_t entry = 0;
  uint64_t bitmap = 0;
  bool operator==(const RawL2&) const = default;
};

inline RawL2 load_l2(const std::byte* at, const Geometry& g) noexcept {
  return {base::load_be<uint64_t>(at), g.extended_l2 ? base::load_be<uint64_t>(at + 8) : 0};
}
inline void store_l2(std::byte* at, RawL2 raw, const Geometry& g) noexcept {
  base::store_be(at, raw.entry);
  if (g.extended_l2) base::store_be(at + 8, raw.bitmap);
}

// Bits [from, to) of a mask of subclusters.
constexpr uint32_t subcluster_mask(unsigned from, unsigned to) noexcept {
  return static_cast<uint32_t>((uint64_t{1} << to) - (uint64_t{1} << from));
}

struct L2Entry {
  bool has_host = false;  // a host cluster is reserved at host_offset
  bool copied = false;    // and is this entry's alone
  bool compressed = false;
  uint32_t data = 0;              // mask: these subclusters are in the host cluster
  uint32_t zero = 0;              // mask: these read as zeroes
  uint64_t host_offset = 0;       // of the cluster, or of the first compressed byte
  uint64_t compressed_bytes = 0;  // at most this many, to the end of the last sector
  const char* problem = nullptr;  // the entry makes no sense

  ClusterKind kind(unsigned subcluster) const noexcept {
    if (problem != nullptr) return ClusterKind::kInvalid;
    if (compressed) return ClusterKind::kCompressed;
    if ((data >> subcluster & 1) != 0) return ClusterKind::kData;
    if ((zero >> subcluster & 1) == 0) return ClusterKind::kUnallocated;
    return has_host ? ClusterKind::kZeroAllocated : ClusterKind::kZeroPlain;
  }
  // How many subclusters from this one on, at most to `end`, are of its kind.
  unsigned same_kind(unsigned subcluster, unsigned end) const noexcept {
    if (problem != nullptr || compressed) return end - subcluster;
    uint32_t same = ~(data | zero);
    if ((data >> subcluster & 1) != 0) same = data;
    if ((zero >> subcluster & 1) != 0) same = zero;
    const auto run = static_cast<unsigned>(std::countr_one(same >> subcluster));
    return run < end - subcluster ? run : end - subcluster;
  }
};

// `guest_offset` is that of the cluster; it matters only where data lies in an external file.
L2Entry decode_l2(RawL2 raw, const Geometry& geometry, uint64_t guest_offset) noexcept;
// Of an entry that is neither compressed nor invalid. In an image without subclusters a host
// cluster is there for data or zeroes.
RawL2 encode_l2(const L2Entry& entry, const Geometry& geometry) noexcept;

// The entry of a cluster whose compressed bytes lie there. Decoding it gives another offset, or a
// problem, where entries of this cluster size do not reach so far.
RawL2 compressed_l2(uint64_t host_offset, uint64_t bytes, const Geometry& geometry) noexcept;

// The clusters of the image that an entry holds references to: first cluster number and count (0:
// none). Those of an external data file are not counted.
struct HostClusters {
  uint64_t first = 0;
  uint64_t count = 0;
};
HostClusters clusters_of(const L2Entry& entry, const Geometry& geometry) noexcept;

}  // namespace minivmm::block::qcow2
