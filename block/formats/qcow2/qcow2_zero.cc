// SPDX-License-Identifier: Apache-2.0
// Zeroing and discarding. Whole clusters by their L2 entries; parts of clusters in place where
// that is efficient, by writing otherwise.
#include <algorithm>
#include <array>
#include <cerrno>
#include <vector>

#include "base/checked.h"
#include "base/event_loop.h"
#include "base/log.h"
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

// The part of a range that is whole units (clusters or subclusters). The last unit of the disk,
// which may be short, counts as whole if the range reaches the end. Where there is none: the empty
// range at the end.
Qcow2Node::Range Qcow2Node::whole_units(uint64_t offset, uint64_t length, uint64_t unit) const {
  const uint64_t end = offset + length;
  const Range out{base::align_up(offset, unit), end == size() ? end : base::align_down(end, unit)};
  return out.begin < out.end ? out : Range{end, end};
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
  before_change(offset, length);
  if (header().raw_data()) {
    zero_raw(offset, length, flags);
    after_change(flags.fua);
    return;
  }
  if (!can_zero_by_entry()) {
    throw Error(ENOTSUP,
                describe() + ": a version 2 image with a backing file has no zero clusters");
  }
  zero_range({offset, offset + length}, flags);
  after_change(flags.fua);
}

void Qcow2Node::driver_discard(uint64_t offset, uint64_t length) {
  before_change(offset, length);
  if (!can_zero_by_entry()) return;
  if (header().raw_data()) {
    zero_raw(offset, length, {.may_unmap = true});
    after_change(false);
    return;
  }
  change_entries(whole_units(offset, length, geometry().cluster_size()), {.may_unmap = true});
  after_change(false);
}

// A raw data file has to say by itself that there are zeroes; then the entries may stay as they
// are.
void Qcow2Node::zero_raw(uint64_t offset, uint64_t length, ZeroFlags flags) {
  const base::Epoch::Pin pin(epoch_);
  require_inside(offset, length);
  image_.data().write_zeroes(offset, length,
                             {.may_unmap = flags.may_unmap, .no_fallback = flags.no_fallback});
}

void Qcow2Node::zero_range(Range range, ZeroFlags flags) {
  const Range whole = whole_units(range.begin, range.length(), geometry().subcluster_size());
  zero_part({range.begin, whole.begin}, flags);
  if (geometry().version >= 3 || flags.may_unmap) {
    change_entries(whole, flags);
  } else {
    zero_part(whole, flags);
  }
  zero_part({whole.end, range.end}, flags);
}

// Whatever lies there, not by its entry.
void Qcow2Node::zero_part(Range range, ZeroFlags flags) {
  while (range.begin < range.end) {
    const base::Epoch::Pin pin(epoch_);
    const Extent extent = image_.map().lookup_long(range.begin, range.length());
    const bool zero_already = extent.kind == ClusterKind::kZeroPlain ||
                              extent.kind == ClusterKind::kZeroAllocated ||
                              (extent.kind == ClusterKind::kUnallocated && unallocated_is_zero());
    if (!zero_already) zero_data(extent, range.begin, flags);
    range.begin += extent.length;
  }
}

void Qcow2Node::zero_data(const Extent& extent, uint64_t offset, ZeroFlags flags) {
  // Encrypted, zeroes are written as any other data.
  if (extent.kind == ClusterKind::kData && extent.copied && image_.encryption() == nullptr) {
    image_.require_data(extent.host_offset, extent.length);
    // What lies past the end of the file is zero already.
    const uint64_t file_size = image_.data().size();
    if (extent.host_offset >= file_size) return;
    image_.data().write_zeroes(extent.host_offset,
                               std::min(extent.length, file_size - extent.host_offset),
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

// Whether there is nothing to change in all of the cluster's L2 table.
bool Qcow2Node::is_empty(uint64_t cluster, Emptying what) {
  const base::Epoch::Pin pin(epoch_);
  return (what == Emptying::kForget || unallocated_is_zero()) &&
         image_.map().without_table(cluster);
}

// Zeroes whole subclusters by what their entries say.
void Qcow2Node::change_entries(Range range, ZeroFlags flags, Emptying what) {
  const qcow2::Geometry& g = geometry();
  for (unsigned slices = 0; range.begin < range.end; ++slices) {
    // One request may cover the whole disk: it must neither fill the memory with changed
    // metadata nor keep the loop to itself.
    if (image_.under_pressure()) commit();
    if (slices % 64 == 63) base::EventLoop::current()->yield();
    const uint64_t cluster = range.begin >> g.cluster_bits;
    const bool nothing = is_empty(cluster, what);
    const uint64_t clusters = nothing ? g.l2_entries() - (cluster & (g.l2_entries() - 1))
                                      : image_.map().clusters_in_slice(cluster);
    const uint64_t end = std::min(range.end, (cluster + clusters) << g.cluster_bits);
    if (!nothing) change_in_slice({range.begin, end}, flags, what);
    range.begin = end;
  }
}

// One slice's part of it: the entries are changed under the slice's lock, the rest follows.
struct Qcow2Node::Zeroing {
  const Qcow2Node& node;
  Range range;
  const bool unmap;
  const Emptying what;
  const uint64_t first;  // cluster
  uint64_t count = 0;

  uint64_t done = 0;  // clusters; less than count: the next entry makes no sense
  qcow2::RawL2 raw = {};
  const char* problem = nullptr;
  std::vector<qcow2::HostClusters> dropped = {};
  std::vector<Range> emptied = {};  // in an external data file
  // Compressed clusters of which only a part is to be zero: the first or the last.
  std::array<Range, 2> by_writing = {};

  // Returns whether something changed.
  bool change(std::byte* at) {
    const qcow2::Geometry& g = node.geometry();
    bool changed = false;
    for (; done < count; ++done, at += g.l2_entry_bytes()) {
      raw = qcow2::load_l2(at, g);
      const uint64_t start = (first + done) << g.cluster_bits;
      const L2Entry old = qcow2::decode_l2(raw, g, start);
      problem = old.problem;
      if (problem != nullptr) break;
      const Range part{std::max(start, range.begin), std::min(start + g.cluster_size(), range.end)};
      const uint32_t subclusters =
          qcow2::subcluster_mask(g.subcluster(part.begin), g.subcluster(part.end - 1) + 1);
      if (old.compressed && subclusters != g.all_subclusters()) {
        by_writing[done == 0 ? 0 : 1] = part;
        continue;
      }
      const L2Entry wanted =
          what == Emptying::kForget ? L2Entry{} : node.zeroed(old, subclusters, unmap);
      const qcow2::RawL2 wanted_raw = encode_l2(wanted, g);
      if (wanted_raw == raw) continue;
      qcow2::store_l2(at, wanted_raw, g);
      changed = true;
      if (!wanted.has_host) let_go(old, start);
    }
    return changed;
  }

  void let_go(const L2Entry& old, uint64_t start) {
    const qcow2::Geometry& g = node.geometry();
    if (const auto clusters = clusters_of(old, g); clusters.count != 0) dropped.push_back(clusters);
    if (!g.external_data || !old.has_host) return;
    if (emptied.empty() || emptied.back().end != start) emptied.push_back({start, start});
    emptied.back().end = start + g.cluster_size();
  }
};

// Under a pin: where the whole subclusters of a range end. The last one counted as whole because
// the disk ended in it; if the disk has grown since, what is behind it is not this request's.
uint64_t Qcow2Node::end_of_whole(Range range) const {
  const uint64_t unit = geometry().subcluster_size();
  if (range.end % unit == 0 || range.end == end_.load()) return range.end;
  return std::max(range.begin, base::align_down(range.end, unit));
}

void Qcow2Node::change_in_slice(Range range, ZeroFlags flags, Emptying what) {
  const qcow2::Geometry& g = geometry();
  const uint64_t first = range.begin >> g.cluster_bits;
  Zeroing work{*this, range, flags.may_unmap, what, first};
  {
    const base::Epoch::Pin pin(epoch_);
    if (what == Emptying::kZero) work.range.end = end_of_whole(range);
    if (work.range.length() != 0) change_claimed(work);
  }
  if (work.done < work.count) {
    throw image_.map().invalid_entry((first + work.done) << g.cluster_bits, work.raw, work.problem);
  }
  for (const Range& part : work.by_writing) zero_part(part, flags);
  zero_part({work.range.end, range.end}, flags);
}

void Qcow2Node::change_claimed(Zeroing& work) {
  const uint64_t first = work.first;
  work.count = geometry().clusters(work.range.end) - first;
  const Claims::Claim claim(claims_, image_.map().claim_group(first), first, work.count);
  const qcow2::SliceRange entries = image_.map().writable(first);
  image_.l2().change(entries.slice,
                     [&](std::byte* slice) { return work.change(slice + entries.position); });
  for (const qcow2::HostClusters& clusters : work.dropped) image_.drop(clusters);
  // Under the claim: nobody writes there anew before the hole is punched.
  for (const Range& hole : work.emptied) punch_data(hole);
}

void Qcow2Node::punch_data(Range hole) {
  try {
    image_.data().discard(hole.begin, hole.length());
  } catch (const Error& e) {
    base::log_debug("{}: its data file keeps the space at {:#x}: {}", describe(), hole.begin,
                    e.what());
  }
}

// The entry after these subclusters were made zero.
L2Entry Qcow2Node::zeroed(const L2Entry& entry, uint32_t subclusters, bool unmap) const {
  L2Entry out = entry.compressed ? L2Entry{} : entry;
  out.data &= ~subclusters;
  if (out.has_host || !unallocated_is_zero()) out.zero |= subclusters;
  if (out.has_host && out.data == 0 && unmap) {
    out.has_host = out.copied = false;
    out.host_offset = 0;
    if (unallocated_is_zero()) out.zero = 0;
  }
  return out;
}

}  // namespace minivmm::block
