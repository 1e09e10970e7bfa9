// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/layout.h"

namespace minivmm::block::qcow2 {
namespace {

L2Entry invalid(const char* why) noexcept {
  L2Entry out;
  out.kind = ClusterKind::kInvalid;
  out.problem = why;
  return out;
}

L2Entry decode_compressed(uint64_t raw, const Geometry& g) noexcept {
  const unsigned offset_bits = 62 - (g.cluster_bits - 8);
  L2Entry out;
  out.kind = ClusterKind::kCompressed;
  out.host_offset = raw & ((1ULL << offset_bits) - 1);
  const uint64_t sectors = ((raw & (kFlagCompressed - 1)) >> offset_bits) + 1;
  out.compressed_bytes = sectors * 512 - (out.host_offset & 511);
  if ((raw & kFlagCopied) != 0) return invalid("a compressed cluster has the COPIED flag");
  if (out.host_offset >= kMaxHostOffset) return invalid("a compressed cluster lies past 64 PiB");
  if (out.host_offset == 0) return invalid("a compressed cluster lies in the header");
  return out;
}

}  // namespace

L2Entry decode_l2(uint64_t raw, const Geometry& g) noexcept {
  if ((raw & kFlagCompressed) != 0) return decode_compressed(raw, g);
  L2Entry out;
  out.copied = (raw & kFlagCopied) != 0;
  out.host_offset = raw & kOffsetMask;
  const bool zero = (raw & kFlagZero) != 0;
  if ((raw & ~(kFlagCopied | kOffsetMask | kFlagZero)) != 0)
    return invalid("reserved bits are set");
  if (zero && g.version < 3) return invalid("the zero flag is set in a version 2 image");
  if (g.offset_in_cluster(out.host_offset) != 0) {
    return invalid("the host cluster is not aligned to the cluster size");
  }
  if (out.host_offset == 0) {
    if (out.copied) return invalid("the host cluster is the header");
    out.kind = zero ? ClusterKind::kZeroPlain : ClusterKind::kUnallocated;
  } else {
    out.kind = zero ? ClusterKind::kZeroAllocated : ClusterKind::kData;
  }
  return out;
}

HostClusters clusters_of(const L2Entry& entry, const Geometry& g) noexcept {
  switch (entry.kind) {
    case ClusterKind::kData:
    case ClusterKind::kZeroAllocated:
      return {entry.host_offset >> g.cluster_bits, 1};
    case ClusterKind::kCompressed: {
      const uint64_t first = entry.host_offset >> g.cluster_bits;
      const uint64_t last = (entry.host_offset + entry.compressed_bytes - 1) >> g.cluster_bits;
      return {first, last - first + 1};
    }
    default:
      return {};
  }
}

const char* l1_problem(uint64_t raw, const Geometry& g) noexcept {
  if ((raw & ~(kFlagCopied | kOffsetMask)) != 0) return "reserved bits are set";
  if (g.offset_in_cluster(raw & kOffsetMask) != 0) return "it is not aligned to the cluster size";
  if ((raw & kOffsetMask) == 0 && raw != 0) return "it points to the header";
  return nullptr;
}

const char* refcount_table_problem(uint64_t raw, const Geometry& g) noexcept {
  if ((raw & ~kRefcountOffsetMask) != 0) return "reserved bits are set";
  if (g.offset_in_cluster(raw) != 0) return "it is not aligned to the cluster size";
  if (raw >= kMaxHostOffset) return "it lies past 64 PiB";
  return nullptr;
}

}  // namespace minivmm::block::qcow2
