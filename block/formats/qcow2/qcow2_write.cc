// SPDX-License-Identifier: Apache-2.0
// Writing. In place where the cluster is the image's own; otherwise to new host clusters, with what
// the request does not cover taken from where the guest sees it now (copy-on-write).
#include <algorithm>
#include <bit>
#include <cerrno>
#include <exception>
#include <vector>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/checked.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace minivmm::block {

using qcow2::Claims;
using qcow2::ClusterKind;
using qcow2::Extent;
using qcow2::L2Entry;

namespace {

constexpr size_t kZeroBytes = 64 * 1024;
alignas(4096) const std::byte kZeroes[kZeroBytes] = {};

void add_zeroes(base::IoList& list, uint64_t length) {
  for (; length > 0; length -= std::min<uint64_t>(length, kZeroBytes)) {
    // SAFETY: a write only reads its buffers.
    list.add(const_cast<std::byte*>(kZeroes), std::min<uint64_t>(length, kZeroBytes));
  }
}

base::Error not_copied() { return {ENOTSUP, "copy range: not in whole clusters, or encrypted"}; }

// `piece`, or `length` zeroes where it is empty.
void add_piece(base::IoList& list, std::span<std::byte> piece, uint64_t length) {
  if (piece.empty()) {
    add_zeroes(list, length);
  } else {
    list.add(piece.data(), piece.size());
  }
}

}  // namespace

// What a write to clusters that cannot be written in place will do. The claim on them is held, so
// their entries do not change meanwhile.
//
// Where the image has subclusters, those that hold data are written in place; the others of the
// same host cluster are filled as far as the request touches them. A new host cluster takes over
// all data of the old one.
struct Qcow2Node::Plan {
  uint64_t offset = 0;    // of the request
  uint64_t length = 0;    // how much of it, from its start; 0: it can be written in place after all
  uint64_t clusters = 0;  // that it touches
  bool reuse = false;     // into host clusters that are there, not new ones
  bool fresh = false;     // the host clusters read as zeroes
  uint64_t host = 0;
  uint64_t begin = 0;  // guest offsets: what is written, the request with what moves along with it;
  uint64_t end = 0;    // whole subclusters
  L2Entry first;       // the entries as they are now
  L2Entry last;
  qcow2::SliceRange entries;

  uint64_t stop() const noexcept { return offset + length; }
};

void Qcow2Node::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  before_change(offset, from.bytes());
  {
    const base::Epoch::Pin pin(epoch_);
    write_range(offset, from);
  }
  after_change(flags.fua);
}

// Under a pin. The disk may have shrunk since the request was checked: what lies behind its end has
// been given up, or is about to be. (The rest of the last cluster is the driver's own to write.)
void Qcow2Node::require_inside(uint64_t offset, uint64_t length) const {
  const uint64_t end = base::align_up(end_.load(), geometry().cluster_size());
  if (base::range_fits(offset, length, end)) return;
  throw base::Error(ENOSPC, fmt::format("{}: the disk was made smaller meanwhile: {} bytes at {} "
                                        "lie behind its end",
                                        describe(), length, offset));
}

// Under a pin.
void Qcow2Node::write_range(uint64_t offset, IoSpan from) {
  require_inside(offset, from.bytes());
  for (uint64_t done = 0; done < from.bytes();) {
    const Extent extent = image_.map().lookup_long(offset + done, from.bytes() - done);
    base::IoList list;
    if (extent.kind == ClusterKind::kData && extent.copied) {
      image_.require_data(extent.host_offset, extent.length);
      image_.write_data({.guest = offset + done, .host = extent.host_offset},
                        base::slice(from, done, extent.length, list));
      done += extent.length;
    } else {
      done += write_new(offset + done, base::slice(from, done, extent.length, list));
    }
  }
}

// Writes some of the range, from its start; returns how much. 0: look again.
uint64_t Qcow2Node::write_new(uint64_t offset, IoSpan from) {
  return fill_new(offset, from.bytes(), [&](const Plan& plan) {
    base::IoList list;
    write_clusters(plan, base::slice(from, 0, plan.length, list));
  });
}

// The same; `fill` does the writing for a plan.
template <typename Fill>
uint64_t Qcow2Node::fill_new(uint64_t offset, uint64_t length, Fill&& fill) {
  const qcow2::Geometry& g = geometry();
  const uint64_t cluster = offset >> g.cluster_bits;
  const uint64_t count = std::min(g.clusters(g.offset_in_cluster(offset) + length),
                                  image_.map().clusters_in_slice(cluster));
  const Claims::Claim claim(claims_, image_.map().claim_group(cluster), cluster, count);
  Plan plan = plan_write(offset, length, count);
  if (plan.length == 0) return 0;
  if (plan.reuse) {
    image_.require_data(plan.host, plan.clusters << g.cluster_bits);
    carry_out(plan, fill);
    return plan.length;
  }
  const qcow2::Allocator::Run run = image_.allocate_data(cluster, plan.clusters);
  if (run.clusters < plan.clusters) {
    plan.clusters = run.clusters;
    plan.length = (run.clusters << g.cluster_bits) - g.offset_in_cluster(offset);
  }
  plan.host = run.offset;
  // A hole decrypts to noise.
  plan.fresh = run.fresh && image_.encryption() == nullptr;
  std::exception_ptr error;
  try {
    carry_out(plan, fill);
  } catch (...) {
    error = std::current_exception();
  }
  if (error) {
    image_.give_back_data(run);
    std::rethrow_exception(error);
  }
  return plan.length;
}

void Qcow2Node::driver_copy_range(uint64_t offset, uint64_t length, Edge& from,
                                  uint64_t from_offset) {
  if (image_.encryption() != nullptr) throw not_copied();
  before_change(offset, length);
  {
    const base::Epoch::Pin pin(epoch_);
    require_inside(offset, length);
    for (uint64_t done = 0; done < length;) {
      const Extent extent = image_.map().lookup_long(offset + done, length - done);
      if (extent.kind == ClusterKind::kData && extent.copied) {
        image_.require_data(extent.host_offset, extent.length);
        image_.data().copy_range(extent.host_offset, extent.length, from, from_offset + done);
        done += extent.length;
      } else {
        done += copy_new(offset + done, extent.length, from, from_offset + done);
      }
    }
  }
  after_change(false);
}

// As write_new. What would have to be filled up around the range is not copied: ENOTSUP.
uint64_t Qcow2Node::copy_new(uint64_t offset, uint64_t length, Edge& from, uint64_t from_offset) {
  return fill_new(offset, length, [&](const Plan& plan) {
    const uint64_t tail = plan.end - plan.stop();
    const bool no_tail = tail == 0 || (plan.fresh && old_is_zero(plan.last, plan.stop(), tail));
    if (plan.begin != plan.offset || !no_tail) throw not_copied();
    image_.data().copy_range(plan.host + geometry().offset_in_cluster(offset), plan.length, from,
                             from_offset);
  });
}

// `count` clusters from that of `offset` on, all in one slice.
Qcow2Node::Plan Qcow2Node::plan_write(uint64_t offset, uint64_t length, uint64_t count) {
  const qcow2::Geometry& g = geometry();
  Plan plan;
  plan.offset = offset;
  plan.entries = image_.map().writable(offset >> g.cluster_bits);
  const uint64_t start = offset - g.offset_in_cluster(offset);
  qcow2::RawL2 raw;
  L2Entry entry;
  image_.l2().read(plan.entries.slice, [&](const std::byte* slice) {
    const std::byte* at = slice + plan.entries.position;
    for (uint64_t i = 0; i < count; ++i, at += g.l2_entry_bytes()) {
      raw = qcow2::load_l2(at, g);
      entry = qcow2::decode_l2(raw, g, start + (i << g.cluster_bits));
      if (!extend(plan, entry, offset + length)) break;
    }
  });
  if (plan.length == 0 && entry.problem != nullptr) {
    throw image_.map().invalid_entry(offset, raw, entry.problem);
  }
  return plan;
}

// Adds the next cluster, which has this entry, up to `end` (a guest offset). False: the plan ends
// here, with a part of that cluster or none of it.
bool Qcow2Node::extend(Plan& plan, const L2Entry& entry, uint64_t end) const {
  const qcow2::Geometry& g = geometry();
  if (entry.problem != nullptr) return false;
  const uint64_t from = plan.stop();
  const uint64_t cluster_end = base::align_down(from, g.cluster_size()) + g.cluster_size();
  const uint64_t to = std::min(end, cluster_end);
  const bool ours = entry.has_host && entry.copied;
  const unsigned sub = g.subcluster(from);
  // Up to the first subcluster that has data: that is written in place.
  const unsigned without_data = static_cast<unsigned>(std::countr_zero(entry.data >> sub));
  const bool whole = !ours || without_data > g.subcluster(to - 1) - sub;
  if (!whole && without_data == 0) return false;
  if (plan.clusters == 0) {
    plan.reuse = ours;
    plan.host = entry.host_offset;
    plan.first = entry;
  } else if (ours != plan.reuse ||
             (ours && entry.host_offset != plan.host + (plan.clusters << g.cluster_bits))) {
    return false;
  }
  plan.last = entry;
  ++plan.clusters;
  const uint64_t begin_of_sub = base::align_down(from, g.subcluster_size());
  plan.length =
      (whole ? to : begin_of_sub + (uint64_t{without_data} << g.subcluster_bits())) - plan.offset;
  return whole;
}

// What the plan writes beside the request: to the ends of the subclusters that this touches, and
// all data of a host cluster that is left.
void Qcow2Node::widen(Plan& plan) const {
  const qcow2::Geometry& g = geometry();
  const unsigned n = g.subclusters();
  unsigned low = g.subcluster(plan.offset);
  unsigned high = g.subcluster(plan.stop() - 1) + 1;
  if (!plan.reuse) {
    const auto first_data = static_cast<unsigned>(std::countr_zero(plan.first.data));
    const auto past_data = static_cast<unsigned>(std::bit_width(plan.last.data));
    low = std::min(low, plan.first.compressed ? 0 : first_data);
    high = std::max(high, plan.last.compressed ? n : past_data);
  }
  const uint64_t size = g.cluster_size();
  plan.begin = base::align_down(plan.offset, size) + (uint64_t{low} << g.subcluster_bits());
  plan.end = base::align_down(plan.stop() - 1, size) + (uint64_t{high} << g.subcluster_bits());
}

template <typename Fill>
void Qcow2Node::carry_out(Plan& plan, Fill&& fill) {
  widen(plan);
  fill(plan);
  link(plan);
}

// What is written before and after a request. A buffer that is empty means zeroes.
struct Qcow2Node::Surroundings {
  base::Buffer storage;
  base::Buffer more;
  std::span<std::byte> before;
  std::span<std::byte> after;
};

void Qcow2Node::read_surroundings(const Plan& plan, Surroundings& out) {
  const uint64_t head = plan.offset - plan.begin;
  const uint64_t tail = plan.end - plan.stop();
  const bool want_head = head != 0 && !old_is_zero(plan.first, plan.begin, head);
  const bool want_tail = tail != 0 && !old_is_zero(plan.last, plan.stop(), tail);
  if (want_head && want_tail && plan.clusters == 1) {
    // One read of all costs less than two of its ends.
    out.storage = base::Buffer(plan.end - plan.begin);
    read_old(plan.first, plan.begin, out.storage.span());
    out.before = out.storage.span().first(head);
    out.after = out.storage.span().last(tail);
    return;
  }
  if (want_head) {
    out.storage = base::Buffer(head);
    out.before = out.storage.span();
    read_old(plan.first, plan.begin, out.before);
  }
  if (want_tail) {
    out.more = base::Buffer(tail);
    out.after = out.more.span();
    read_old(plan.last, plan.stop(), out.after);
  }
}

// One write: what is before the request, the request, what is after it. Ends that are zero are left
// out where the host reads as zero anyway.
void Qcow2Node::write_clusters(const Plan& plan, IoSpan from) {
  Surroundings around;
  read_surroundings(plan, around);
  base::IoList list;
  const uint64_t head = plan.offset - plan.begin;
  const bool skip_head = plan.fresh && (around.before.empty() || base::is_zero(around.before));
  const bool skip_tail = plan.fresh && (around.after.empty() || base::is_zero(around.after));
  if (!skip_head) add_piece(list, around.before, head);
  list.add(from);
  if (!skip_tail) add_piece(list, around.after, plan.end - plan.stop());
  const uint64_t begin = skip_head ? plan.offset : plan.begin;
  const qcow2::Encryption::Place place{.guest = begin,
                                       .host = plan.host + geometry().offset_in_cluster(begin)};
  if (plan.reuse) {
    image_.write_data(place, list);
  } else {
    image_.write_new_data(place, list);
  }
}

// Whether the guest sees only zeroes in a range inside one cluster, by that cluster's entry.
bool Qcow2Node::old_is_zero(const L2Entry& entry, uint64_t offset, uint64_t length) const {
  const qcow2::Geometry& g = geometry();
  if (entry.compressed) return false;
  const uint32_t asked =
      qcow2::subcluster_mask(g.subcluster(offset), g.subcluster(offset + length - 1) + 1);
  if ((entry.data & asked) != 0) return false;
  return !backing_ || offset >= backing_->size() || (asked & ~entry.zero) == 0;
}

// What the guest sees in a range inside one cluster, by that cluster's entry.
void Qcow2Node::read_old(const L2Entry& entry, uint64_t offset, std::span<std::byte> to) {
  const qcow2::Geometry& g = geometry();
  while (!to.empty()) {
    const unsigned sub = g.subcluster(offset);
    const uint64_t run = uint64_t{entry.same_kind(sub, g.subclusters())} << g.subcluster_bits();
    const uint64_t most = run - (offset & (g.subcluster_size() - 1));
    const auto piece = to.first(std::min<uint64_t>(most, to.size()));
    const Extent extent = qcow2::extent_of(entry, offset, piece.size(), g);
    read_extent(extent, offset, base::SingleBuffer(piece));
    offset += piece.size();
    to = to.subspan(piece.size());
  }
}

// The data is in its place: from here on readers find it.
void Qcow2Node::link(const Plan& plan) {
  const qcow2::Geometry& g = geometry();
  const uint64_t start = plan.offset - g.offset_in_cluster(plan.offset);
  std::vector<qcow2::HostClusters> dropped;
  image_.l2().change(plan.entries.slice, [&](std::byte* slice) {
    std::byte* at = slice + plan.entries.position;
    for (uint64_t i = 0; i < plan.clusters; ++i, at += g.l2_entry_bytes()) {
      L2Entry entry = qcow2::decode_l2(qcow2::load_l2(at, g), g, start + (i << g.cluster_bits));
      const auto old = clusters_of(entry, g);
      if (!plan.reuse && old.count != 0) dropped.push_back(old);
      const uint32_t written = qcow2::subcluster_mask(
          i == 0 ? g.subcluster(plan.begin) : 0,
          i + 1 == plan.clusters ? g.subcluster(plan.end - 1) + 1 : g.subclusters());
      entry.has_host = entry.copied = true;
      entry.compressed = false;
      entry.host_offset = plan.host + (i << g.cluster_bits);
      entry.data |= written;
      entry.zero &= ~written;
      qcow2::store_l2(at, encode_l2(entry, g), g);
    }
    return true;
  });
  for (const qcow2::HostClusters& old : dropped) image_.drop(old);
}

}  // namespace minivmm::block
