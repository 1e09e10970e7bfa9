// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/mend_entry.h"

namespace minivmm::block::qcow2 {
namespace {

constexpr unsigned kZeroShift = 32;
constexpr uint64_t kAllZero = uint64_t{0xffff'ffff} << kZeroShift;
constexpr uint64_t kDataBits = 0xffff'ffff;

RawL2 mend_compressed(RawL2 raw, const Geometry& g, uint64_t guest_offset) noexcept {
  const RawL2 out{raw.entry & ~kFlagCopied, 0};
  return decode_l2(out, g, guest_offset).problem == nullptr ? out : without_host(raw, g);
}

// A subcluster with both bits has data: that is what would be lost.
uint64_t mend_bitmap(uint64_t bitmap) noexcept {
  return bitmap & ~((bitmap & kDataBits) << kZeroShift);
}

}  // namespace

RawL2 without_host(RawL2 raw, const Geometry& g) noexcept {
  if (g.extended_l2) {
    if ((raw.entry & kFlagCompressed) != 0) return {0, kAllZero};
    const uint64_t zero = raw.bitmap & kAllZero;
    return {0, zero | (raw.bitmap & kDataBits) << kZeroShift};
  }
  return {g.version < 3 ? 0 : kFlagZero, 0};
}

RawL2 mend_l2(RawL2 raw, const Geometry& g, uint64_t guest_offset) noexcept {
  if ((raw.entry & kFlagCompressed) != 0) return mend_compressed(raw, g, guest_offset);
  const uint64_t zero_flag = g.extended_l2 || g.version < 3 ? 0 : kFlagZero;
  RawL2 out{raw.entry & (kFlagCopied | kOffsetMask | zero_flag), mend_bitmap(raw.bitmap)};
  const uint64_t offset = out.entry & kOffsetMask;
  const bool copied = (out.entry & kFlagCopied) != 0;
  if (g.external_data) {
    // Data lies where the guest has it and nowhere else.
    if (offset != 0 || copied) out.entry = (out.entry & ~kOffsetMask) | guest_offset;
    const bool has_host = offset != 0 || copied;
    return has_host || (out.bitmap & kDataBits) == 0 ? out : without_host(out, g);
  }
  if (g.offset_in_cluster(offset) != 0) return without_host(out, g);
  if (offset != 0) return out;
  out.entry &= ~kFlagCopied;
  return (out.bitmap & kDataBits) == 0 ? out : without_host(out, g);
}

}  // namespace minivmm::block::qcow2
