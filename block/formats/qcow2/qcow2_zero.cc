// SPDX-License-Identifier: Apache-2.0
// Zeroing and discarding. Whole clusters by their L2 entries; parts of clusters in place where
// that is efficient, by writing otherwise.
#include <algorithm>
#include <cerrno>

#include "base/bytes.h"
#include "base/checked.h"
#include "base/event_loop.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace minivmm::block {

using base::Error;
using qcow2::Claims;
using qcow2::ClusterKind;
using qcow2::Extent;
using qcow2::L2Entry;

namespace {

constexpr size_t kZeroBytes = 64 * 1024;
alignas(4096) const std::byte kZeroes[kZeroBytes] = {};

}  // namespace

// The clusters that lie in a range as a whole. The last one of the disk, which may be short,
// counts as whole if the range reaches the end.
struct Qcow2Node::WholeClusters {
  uint64_t begin = 0;  // bytes
  uint64_t end = 0;
  uint64_t first = 0;  // clusters
  uint64_t count = 0;
};

Qcow2Node::WholeClusters Qcow2Node::whole_clusters(uint64_t offset, uint64_t length) const {
  const uint64_t cluster = geometry().cluster_size();
  WholeClusters out;
  out.begin = base::align_up(offset, cluster);
  out.end =
      offset + length == size() ? offset + length : base::align_down(offset + length, cluster);
  if (out.begin >= out.end) {
    out.begin = out.end = offset + length;
    return out;
  }
  out.first = out.begin >> geometry().cluster_bits;
  out.count = geometry().clusters(out.end - out.begin);
  return out;
}

// An entry can say "zeroes" in version 3; in version 2 "unallocated" means it where there is no
// backing file.
//
// Requests may be as large as the disk. They pin the epoch piece by piece: what the commits on the
// way free is reclaimed meanwhile, or it would all wait for the end.
bool Qcow2Node::can_zero_by_entry() const noexcept {
  return geometry().version >= 3 || unallocated_is_zero();
}

void Qcow2Node::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  image_.prepare_write();
  if (!can_zero_by_entry()) {
    throw Error(ENOTSUP,
                describe() + ": a version 2 image with a backing file has no zero clusters");
  }
  zero_range(offset, length, flags);
  after_change(flags.fua);
}

void Qcow2Node::driver_discard(uint64_t offset, uint64_t length) {
  image_.prepare_write();
  if (!can_zero_by_entry()) return;
  const WholeClusters whole = whole_clusters(offset, length);
  change_clusters(whole.first, whole.count, true);
  after_change(false);
}

void Qcow2Node::zero_range(uint64_t offset, uint64_t length, ZeroFlags flags) {
  const WholeClusters whole = whole_clusters(offset, length);
  zero_part(offset, whole.begin - offset, flags);
  if (geometry().version >= 3 || flags.may_unmap) {
    change_clusters(whole.first, whole.count, flags.may_unmap);
  } else {
    zero_part(whole.begin, whole.end - whole.begin, flags);
  }
  zero_part(whole.end, offset + length - whole.end, flags);
}

void Qcow2Node::zero_part(uint64_t offset, uint64_t length, ZeroFlags flags) {
  for (uint64_t done = 0; done < length;) {
    const base::Epoch::Pin pin(epoch_);
    const Extent extent = image_.map().lookup_long(offset + done, length - done);
    const bool zero_already = extent.kind == ClusterKind::kZeroPlain ||
                              extent.kind == ClusterKind::kZeroAllocated ||
                              (extent.kind == ClusterKind::kUnallocated && unallocated_is_zero());
    if (!zero_already) zero_data(extent, offset + done, flags);
    done += extent.length;
  }
}

void Qcow2Node::zero_data(const Extent& extent, uint64_t offset, ZeroFlags flags) {
  if (extent.kind == ClusterKind::kData && extent.copied) {
    image_.require_data(extent.host_offset, extent.length);
    // What lies past the end of the file is zero already.
    const uint64_t file_size = image_.file().size();
    if (extent.host_offset >= file_size) return;
    file().write_zeroes(extent.host_offset, std::min(extent.length, file_size - extent.host_offset),
                        {.may_unmap = flags.may_unmap, .no_fallback = flags.no_fallback});
    return;
  }
  if (flags.no_fallback) {
    throw Error(ENOTSUP, describe() + ": a part of a cluster cannot be zeroed without writing it");
  }
  for (uint64_t done = 0; done < extent.length;) {
    const uint64_t now = std::min<uint64_t>(kZeroBytes, extent.length - done);
    write_range(offset + done, base::SingleBuffer(static_cast<const void*>(kZeroes), now));
    done += now;
  }
}

void Qcow2Node::change_clusters(uint64_t first, uint64_t count, bool unmap) {
  const uint64_t table_entries = geometry().l2_entries();
  for (unsigned slices = 0; count > 0; ++slices) {
    // One request may cover the whole disk: it must neither fill the memory with changed
    // metadata nor keep the loop to itself.
    if (image_.under_pressure()) commit();
    if (slices % 64 == 63) base::EventLoop::current()->yield();
    const base::Epoch::Pin pin(epoch_);
    uint64_t now = 0;
    if (unallocated_is_zero() && image_.map().without_table(first)) {
      now = std::min(count, table_entries - (first & (table_entries - 1)));  // zeroes already
    } else {
      now = std::min(count, image_.map().clusters_in_slice(first));
      change_in_slice(first, now, unmap);
    }
    first += now;
    count -= now;
  }
}

void Qcow2Node::change_in_slice(uint64_t first, uint64_t count, bool unmap) {
  const Claims::Claim claim(claims_, image_.map().claim_group(first), first, count);
  const qcow2::SliceRange entries = image_.map().writable(first);
  std::vector<uint64_t> dropped(count);  // 0: nothing
  uint64_t invalid = count;
  image_.l2().change(entries.slice, [&](std::byte* slice) {
    bool changed = false;
    for (uint64_t i = 0; i < count; ++i) {
      std::byte* at = slice + entries.position + i * 8;
      const uint64_t raw = base::load_be<uint64_t>(at);
      if (decode_l2(raw, geometry()).kind == ClusterKind::kInvalid) {
        invalid = i;
        dropped[i] = raw;
        break;
      }
      const uint64_t wanted = zero_entry(raw, unmap);
      if (wanted == raw) continue;
      base::store_be(at, wanted);
      changed = true;
      const bool keeps_cluster = (wanted & qcow2::kOffsetMask) != 0;
      if (!keeps_cluster) dropped[i] = raw;
    }
    return changed;
  });
  const uint64_t bad_raw = invalid < count ? dropped[invalid] : 0;
  dropped.resize(invalid);
  drop_entries(dropped);
  if (invalid < count) image_.map().decode(bad_raw, first + invalid);  // throws what it is
}

uint64_t Qcow2Node::zero_entry(uint64_t raw, bool unmap) const {
  const L2Entry entry = decode_l2(raw, geometry());
  const bool zero_flag = geometry().version >= 3;
  if (entry.kind == ClusterKind::kUnallocated && unallocated_is_zero()) return raw;
  if (!unmap && zero_flag &&
      (entry.kind == ClusterKind::kData || entry.kind == ClusterKind::kZeroAllocated)) {
    return raw | qcow2::kFlagZero;  // the host cluster stays reserved
  }
  return !unallocated_is_zero() && zero_flag ? qcow2::kFlagZero : 0;
}

}  // namespace minivmm::block
