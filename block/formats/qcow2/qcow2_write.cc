// SPDX-License-Identifier: Apache-2.0
// Writing. In place where the cluster is the image's own; otherwise to new host clusters, with what
// the request does not cover taken from where the guest sees it now (copy-on-write).
#include <algorithm>
#include <exception>

#include "base/buffer.h"
#include "base/bytes.h"
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
struct Qcow2Node::Plan {
  uint64_t count = 0;  // 0: it can be written in place after all
  bool reuse = false;  // into clusters that are reserved (zero flag set), not new ones
  bool fresh = false;  // the host clusters read as zeroes
  uint64_t host = 0;
  uint64_t first_raw = 0;  // entries as they are now
  uint64_t last_raw = 0;
  qcow2::SliceRange entries;
};

void Qcow2Node::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  image_.prepare_write();
  {
    const base::Epoch::Pin pin(epoch_);
    write_range(offset, from);
  }
  after_change(flags.fua);
}

void Qcow2Node::write_range(uint64_t offset, IoSpan from) {
  for (uint64_t done = 0; done < from.bytes();) {
    const Extent extent = image_.map().lookup_long(offset + done, from.bytes() - done);
    base::IoList list;
    if (extent.kind == ClusterKind::kData && extent.copied) {
      image_.require_data(extent.host_offset, extent.length);
      file().write(extent.host_offset, base::slice(from, done, extent.length, list));
      done += extent.length;
    } else {
      done += write_new(offset + done, base::slice(from, done, extent.length, list));
    }
  }
}

// Writes some of the range, from its start; returns how much. 0: look again.
uint64_t Qcow2Node::write_new(uint64_t offset, IoSpan from) {
  const qcow2::Geometry& g = geometry();
  const uint64_t cluster = offset >> g.cluster_bits;
  const uint64_t count = std::min(g.clusters(g.offset_in_cluster(offset) + from.bytes()),
                                  image_.map().clusters_in_slice(cluster));
  const Claims::Claim claim(claims_, image_.map().claim_group(cluster), cluster, count);
  Plan plan = plan_write(cluster, count);
  if (plan.count == 0) return 0;
  if (plan.reuse) {
    image_.require_data(plan.host, plan.count << g.cluster_bits);
    return write_plan(plan, offset, from);
  }
  const qcow2::Allocator::Run run = image_.allocator().allocate(plan.count);
  plan.count = run.clusters;
  plan.host = run.offset;
  plan.fresh = run.fresh;
  std::exception_ptr error;
  uint64_t done = 0;
  try {
    done = write_plan(plan, offset, from);
  } catch (...) {
    error = std::current_exception();
  }
  if (error) {
    image_.allocator().give_back(run.offset, run.clusters);
    std::rethrow_exception(error);
  }
  return done;
}

Qcow2Node::Plan Qcow2Node::plan_write(uint64_t cluster, uint64_t count) {
  Plan plan;
  plan.entries = image_.map().writable(cluster);
  const uint64_t cluster_size = geometry().cluster_size();
  L2Entry bad;
  image_.l2().read(plan.entries.slice, [&](const std::byte* slice) {
    const auto raw_at = [&](uint64_t i) {
      return base::load_be<uint64_t>(slice + plan.entries.position + i * 8);
    };
    plan.first_raw = plan.last_raw = raw_at(0);
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t raw = raw_at(i);
      const L2Entry entry = decode_l2(raw, geometry());
      const bool reserved = entry.kind == ClusterKind::kZeroAllocated && entry.copied;
      const bool in_place = entry.kind == ClusterKind::kData && entry.copied;
      if (entry.kind == ClusterKind::kInvalid) bad = entry;
      if (in_place || entry.kind == ClusterKind::kInvalid) break;
      if (i == 0) {
        plan.reuse = reserved;
        plan.host = entry.host_offset;
      }
      if (reserved != plan.reuse) break;
      if (reserved && entry.host_offset != plan.host + i * cluster_size) break;
      plan.last_raw = raw;
      ++plan.count;
    }
  });
  if (bad.kind == ClusterKind::kInvalid && plan.count == 0) {
    throw image_.map().invalid_entry(cluster << geometry().cluster_bits, plan.first_raw,
                                     bad.problem);
  }
  return plan;
}

uint64_t Qcow2Node::write_plan(const Plan& plan, uint64_t offset, IoSpan from) {
  const qcow2::Geometry& g = geometry();
  const uint64_t room = (plan.count << g.cluster_bits) - g.offset_in_cluster(offset);
  const uint64_t length = std::min(from.bytes(), room);
  {
    base::IoList list;
    write_clusters(plan, offset, base::slice(from, 0, length, list));
  }
  link(plan);
  return length;
}

// What surrounds a request in its first and last cluster. A buffer that is empty means zeroes.
struct Qcow2Node::Surroundings {
  base::Buffer storage;
  base::Buffer more;
  std::span<std::byte> before;
  std::span<std::byte> after;
};

void Qcow2Node::read_surroundings(const Plan& plan, uint64_t begin, uint64_t end,
                                  Surroundings& out) {
  const uint64_t mask = geometry().cluster_size() - 1;
  const uint64_t head = begin & mask;
  const uint64_t tail = (geometry().cluster_size() - (end & mask)) & mask;
  const bool want_head = head != 0 && !old_is_zero(plan.first_raw, begin - head);
  const bool want_tail = tail != 0 && !old_is_zero(plan.last_raw, end);
  if (want_head && want_tail && plan.count == 1) {
    // One read of the whole cluster costs less than two of its ends.
    out.storage = base::Buffer(geometry().cluster_size());
    read_old(plan.first_raw, begin - head, out.storage.span());
    out.before = out.storage.span().first(head);
    out.after = out.storage.span().last(tail);
    return;
  }
  if (want_head) {
    out.storage = base::Buffer(head);
    out.before = out.storage.span();
    read_old(plan.first_raw, begin - head, out.before);
  }
  if (want_tail) {
    out.more = base::Buffer(tail);
    out.after = out.more.span();
    read_old(plan.last_raw, end, out.after);
  }
}

// One write: what is before the request in its first cluster, the request, what is after it in
// its last. Ends that are zero are left out where the host reads as zero anyway.
void Qcow2Node::write_clusters(const Plan& plan, uint64_t offset, IoSpan from) {
  const uint64_t mask = geometry().cluster_size() - 1;
  const uint64_t end = offset + from.bytes();
  const uint64_t head = offset & mask;
  const uint64_t tail = (geometry().cluster_size() - (end & mask)) & mask;
  Surroundings around;
  read_surroundings(plan, offset, end, around);
  base::IoList list;
  const bool skip_head = plan.fresh && (around.before.empty() || base::is_zero(around.before));
  const bool skip_tail = plan.fresh && (around.after.empty() || base::is_zero(around.after));
  if (!skip_head) add_piece(list, around.before, head);
  list.add(from);
  if (!skip_tail) add_piece(list, around.after, tail);
  file().write(plan.host + (skip_head ? head : 0), list);
}

bool Qcow2Node::old_is_zero(uint64_t raw, uint64_t offset) const {
  const ClusterKind kind = decode_l2(raw, geometry()).kind;
  if (kind == ClusterKind::kUnallocated) return !backing_ || offset >= backing_->size();
  return kind == ClusterKind::kZeroPlain || kind == ClusterKind::kZeroAllocated;
}

// What the guest sees at `offset` (inside one cluster), by the entry `raw`.
void Qcow2Node::read_old(uint64_t raw, uint64_t offset, std::span<std::byte> to) {
  const L2Entry entry = decode_l2(raw, geometry());
  Extent extent;
  extent.kind = entry.kind;
  extent.raw = raw;
  extent.length = to.size();
  extent.host_offset = entry.host_offset + geometry().offset_in_cluster(offset);
  read_extent(extent, offset, base::SingleBuffer(to));
}

// The data is in its place: from here on readers find it.
void Qcow2Node::link(const Plan& plan) {
  const uint64_t cluster_size = geometry().cluster_size();
  std::vector<uint64_t> dropped;
  if (!plan.reuse) dropped.resize(plan.count);
  image_.l2().change(plan.entries.slice, [&](std::byte* slice) {
    for (uint64_t i = 0; i < plan.count; ++i) {
      std::byte* at = slice + plan.entries.position + i * 8;
      if (!plan.reuse) dropped[i] = base::load_be<uint64_t>(at);
      base::store_be(at, (plan.host + i * cluster_size) | qcow2::kFlagCopied);
    }
    return true;
  });
  drop_entries(dropped);
}

void Qcow2Node::drop_entries(const std::vector<uint64_t>& raw_entries) {
  for (const uint64_t raw : raw_entries) {
    image_.drop(clusters_of(decode_l2(raw, geometry()), geometry()));
  }
}

}  // namespace minivmm::block
