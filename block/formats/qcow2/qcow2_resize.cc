// SPDX-License-Identifier: Apache-2.0
// Resizing, while the disk is in use.
//
// What lies behind the end of the disk may be anything (the rest of the last cluster, a longer
// backing file, clusters of another program). Growing makes all of it zero before the header says
// the new size. Shrinking gives the clusters behind the new end up before the header says it: a
// crash in between leaves the old size, and what was to go is gone in part.
#include <algorithm>
#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace minivmm::block {

using base::Error;
using qcow2::ClusterKind;
using qcow2::Extent;

namespace {

bool reads_as_zero(ClusterKind kind) {
  return kind == ClusterKind::kZeroPlain || kind == ClusterKind::kZeroAllocated;
}

}  // namespace

void Qcow2Node::driver_truncate(uint64_t new_size) {
  if (new_size % 512 != 0) {
    throw Error(EINVAL, fmt::format("{}: the new size of {} bytes is not a multiple of 512",
                                    describe(), new_size));
  }
  image_.prepare_write();
  const std::lock_guard one_at_a_time(resizing_);
  if (new_size == size()) return;
  if (geometry().version < 3 && image_.file().header_update().current().snapshots != 0) {
    throw Error(ENOTSUP, describe() +
                             ": a version 2 image that has snapshots cannot be resized: they do "
                             "not record the size of their disk");
  }
  image_.bitmaps().prepare_resize();
  const uint64_t old_size = size();
  // Before anything else: no request may still reach behind a nearer end, or take what is behind
  // the present one for nobody's.
  if (new_size < old_size) set_size(new_size);
  end_.store(new_size);
  try {
    epoch_.synchronize();
    if (new_size > old_size) {
      grow(new_size);
    } else {
      shrink(new_size, old_size);
    }
  } catch (...) {
    end_.store(old_size);
    set_size(old_size);
    throw;
  }
  set_size(new_size);
  if (new_size < old_size) {
    image_.bitmaps().resize(new_size);
    trim(new_size);
  }
}

void Qcow2Node::grow(uint64_t new_size) {
  const qcow2::Geometry& g = geometry();
  const uint64_t span = 1ULL << g.l1_shift();
  image_.grow_l1(new_size / span + (new_size % span != 0 ? 1 : 0), epoch_);
  Edge* const data = image_.data_file();
  if (header().raw_data()) {
    // A raw file says by itself what there is, also behind the disk's old end.
    const uint64_t end = std::min(new_size, data->size());
    if (size() < end) zero_raw(size(), end - size(), {.may_unmap = true});
  }
  if (data != nullptr && data->size() < new_size) data->truncate(new_size);
  zero_behind({size(), base::align_up(new_size, g.cluster_size())});
  commit();
  image_.bitmaps().resize(new_size);
  image_.file().change_numbers([&](qcow2::Header& h) { h.size = new_size; });
}

// Makes a range past the end of the disk read as zeroes.
void Qcow2Node::zero_behind(Range range) {
  for (unsigned n = 0; range.begin < range.end; ++n) {
    if (n % 64 == 63) base::EventLoop::current()->yield();
    Extent extent;
    {
      const base::Epoch::Pin pin(epoch_);
      extent = image_.map().lookup_long(range.begin, range.length());
    }
    bool zero = reads_as_zero(extent.kind);
    if (extent.kind == ClusterKind::kUnallocated) {
      const uint64_t base_end = backing_ ? backing_->size() : 0;
      zero = unallocated_is_zero() || (backing_ && range.begin >= base_end);
      if (backing_ && !zero) {
        const uint64_t end = base::align_up(base_end, geometry().cluster_size());
        extent.length = std::min(extent.length, end - range.begin);
      }
    }
    if (!zero) {
      // Version 2 cannot say "zeroes" above a backing file: there they are written.
      zero_range({range.begin, range.begin + extent.length}, {.may_unmap = can_zero_by_entry()});
      if (image_.under_pressure()) commit();
    }
    range.begin += extent.length;
  }
}

void Qcow2Node::shrink(uint64_t new_size, uint64_t old_size) {
  give_up_behind(new_size, old_size);
  image_.file().change_numbers([&](qcow2::Header& h) { h.size = new_size; });
}

// The disk has shrunk. What it no longer needs is free when this returns, if nothing goes wrong.
void Qcow2Node::trim(uint64_t new_size) {
  Edge* const data = image_.data_file();
  try {
    if (data != nullptr && data->size() > new_size) data->truncate(new_size);
  } catch (const Error& e) {
    base::log_warning("{}: its data file stays longer than the disk: {}", describe(), e.what());
  }
  reclaim();
}

void Qcow2Node::give_up_behind(uint64_t new_size, uint64_t old_size) {
  const qcow2::Geometry& g = geometry();
  const uint64_t end = base::align_up(old_size, g.cluster_size());
  const uint64_t whole = base::align_up(new_size, g.cluster_size());
  if (whole < end) change_entries({whole, end}, {.may_unmap = true}, Emptying::kForget);
  // The rest of the last cluster: other programs that grow the disk may not look at it.
  const uint64_t tail_end = std::min(whole, old_size);
  for (uint64_t at = new_size; at < tail_end;) {
    const base::Epoch::Pin pin(epoch_);
    const Extent extent = image_.map().lookup_long(at, tail_end - at);
    const bool stored =
        extent.kind == ClusterKind::kData || extent.kind == ClusterKind::kCompressed;
    if (stored) zero_data(extent, at, {});
    at += extent.length;
  }
  // The tables behind the end are empty, and after this commit their changes are all written.
  commit();
  const uint64_t span = 1ULL << g.l1_shift();
  for (uint64_t i = new_size / span + (new_size % span != 0 ? 1 : 0); i < image_.l1_size(); ++i) {
    const base::Epoch::Pin pin(epoch_);
    image_.map().drop_table(i);
  }
  commit();
}

}  // namespace minivmm::block
