// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/l2_entry.h"

namespace minivmm::block::qcow2 {
namespace {

constexpr unsigned kZeroShift = 32;

L2Entry invalid(const char* why) noexcept {
  L2Entry out;
  out.problem = why;
  return out;
}

L2Entry decode_compressed(RawL2 raw, const Geometry& g) noexcept {
  const unsigned offset_bits = 62 - (g.cluster_bits - 8);
  L2Entry out;
  out.compressed = true;
  out.host_offset = raw.entry & ((1ULL << offset_bits) - 1);
  const uint64_t sectors = ((raw.entry & (kFlagCompressed - 1)) >> offset_bits) + 1;
  out.compressed_bytes = sectors * 512 - (out.host_offset & 511);
  if ((raw.entry & kFlagCopied) != 0) return invalid("a compressed cluster has the COPIED flag");
  if (out.host_offset >= kMaxHostOffset) return invalid("a compressed cluster lies past 64 PiB");
  if (out.host_offset == 0) return invalid("a compressed cluster lies in the header");
  return out;
}

// What the bitmap says, or for an entry without one the ZERO flag.
L2Entry with_subclusters(L2Entry out, RawL2 raw, const Geometry& g) noexcept {
  if (!g.extended_l2) {
    out.zero = (raw.entry & kFlagZero) != 0 ? 1 : 0;
    out.data = out.has_host && out.zero == 0 ? 1 : 0;
    return out;
  }
  out.data = static_cast<uint32_t>(raw.bitmap);
  out.zero = static_cast<uint32_t>(raw.bitmap >> kZeroShift);
  if ((out.data & out.zero) != 0) return invalid("a subcluster has data and is zero at once");
  if (out.data != 0 && !out.has_host) return invalid("a subcluster has data and no host cluster");
  return out;
}

}  // namespace

L2Entry decode_l2(RawL2 raw, const Geometry& g, uint64_t guest_offset) noexcept {
  if ((raw.entry & kFlagCompressed) != 0) {
    if (g.external_data) return invalid("a cluster in the external data file is compressed");
    return decode_compressed(raw, g);
  }
  const uint64_t zero_flag = g.extended_l2 ? 0 : kFlagZero;
  if ((raw.entry & ~(kFlagCopied | kOffsetMask | zero_flag)) != 0) {
    return invalid("reserved bits are set");
  }
  if ((raw.entry & kFlagZero) != 0 && g.version < 3) {
    return invalid("the zero flag is set in a version 2 image");
  }
  L2Entry out;
  out.copied = (raw.entry & kFlagCopied) != 0;
  out.host_offset = raw.entry & kOffsetMask;
  out.has_host = out.host_offset != 0;
  if (g.offset_in_cluster(out.host_offset) != 0) {
    return invalid("the host cluster is not aligned to the cluster size");
  }
  if (g.external_data) {
    out.has_host = out.has_host || out.copied;
    if (out.has_host && out.host_offset != guest_offset) {
      return invalid("its place in the data file is not the guest's");
    }
  } else if (!out.has_host && out.copied) {
    return invalid("the host cluster is the header");
  }
  return with_subclusters(out, raw, g);
}

RawL2 encode_l2(const L2Entry& entry, const Geometry& g) noexcept {
  RawL2 out;
  if (entry.has_host) out.entry = entry.host_offset | (entry.copied ? kFlagCopied : 0);
  if (g.extended_l2) {
    out.bitmap = uint64_t{entry.zero} << kZeroShift | entry.data;
  } else if (entry.zero != 0) {
    out.entry |= kFlagZero;
  }
  return out;
}

RawL2 compressed_l2(uint64_t host_offset, uint64_t bytes, const Geometry& g) noexcept {
  const unsigned offset_bits = 62 - (g.cluster_bits - 8);
  const uint64_t more_sectors = ((host_offset + bytes - 1) >> 9) - (host_offset >> 9);
  const uint64_t mask = (1ULL << offset_bits) - 1;
  return {kFlagCompressed | more_sectors << offset_bits | (host_offset & mask), 0};
}

HostClusters clusters_of(const L2Entry& entry, const Geometry& g) noexcept {
  if (g.external_data) return {};
  if (entry.has_host) return {entry.host_offset >> g.cluster_bits, 1};
  if (!entry.compressed) return {};
  const uint64_t first = entry.host_offset >> g.cluster_bits;
  const uint64_t last = (entry.host_offset + entry.compressed_bytes - 1) >> g.cluster_bits;
  return {first, last - first + 1};
}

}  // namespace minivmm::block::qcow2
