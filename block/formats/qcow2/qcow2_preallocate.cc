// SPDX-License-Identifier: Apache-2.0
// Host clusters for a range of the disk that reads as zeroes and that nobody uses yet, so that
// writing to it later needs no allocation (and, with kFalloc, cannot run out of space).
#include <algorithm>
#include <exception>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/event_loop.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace minivmm::block {

using qcow2::Claims;
using qcow2::L2Entry;

void Qcow2Node::driver_preallocate(uint64_t offset, uint64_t length, Preallocation how) {
  image_.prepare_write();
  const qcow2::Geometry& g = geometry();
  // The rest of a cluster that begins before the range: something may be there.
  const uint64_t whole = std::min(offset + length, base::align_up(offset, g.cluster_size()));
  if (offset < whole) {
    base::Buffer zeroes = base::Buffer::zeroed(whole - offset);
    const base::Epoch::Pin pin(epoch_);
    write_range(offset, zeroes.io());
  }
  uint64_t cluster = g.clusters(offset);
  const uint64_t end = g.clusters(offset + length);
  for (unsigned n = 0; cluster < end; ++n) {
    if (n % 64 == 63) base::EventLoop::current()->yield();
    cluster += preallocate_some(cluster, end - cluster, how);
    after_change(false);
  }
}

// Some of the clusters from this one on; returns how many have been dealt with.
uint64_t Qcow2Node::preallocate_some(uint64_t cluster, uint64_t most, Preallocation how) {
  const qcow2::Geometry& g = geometry();
  const base::Epoch::Pin pin(epoch_);
  const uint64_t in_slice = std::min(most, image_.map().clusters_in_slice(cluster));
  const Claims::Claim claim(claims_, image_.map().claim_group(cluster), cluster, in_slice);
  const qcow2::SliceRange entries = image_.map().writable(cluster);
  bool has_host = false;
  const uint64_t alike = clusters_without_host(entries, cluster, in_slice, has_host);
  if (has_host) return alike;
  const qcow2::Allocator::Run run = image_.allocate_data(cluster, alike);
  std::exception_ptr error;
  try {
    make_zero(cluster, run, how);
  } catch (...) {
    error = std::current_exception();
  }
  if (error) {
    image_.give_back_data(run);
    std::rethrow_exception(error);
  }
  image_.l2().change(entries.slice, [&](std::byte* slice) {
    std::byte* at = slice + entries.position;
    for (uint64_t i = 0; i < run.clusters; ++i, at += g.l2_entry_bytes()) {
      L2Entry entry;
      entry.has_host = entry.copied = true;
      entry.host_offset = run.offset + (i << g.cluster_bits);
      entry.data = g.all_subclusters();
      qcow2::store_l2(at, encode_l2(entry, g), g);
    }
    return true;
  });
  return run.clusters;
}

// How many of the clusters are like the first: with a host cluster (or compressed), or without.
uint64_t Qcow2Node::clusters_without_host(const qcow2::SliceRange& entries, uint64_t cluster,
                                          uint64_t most, bool& has_host) {
  const qcow2::Geometry& g = geometry();
  qcow2::RawL2 raw;
  const char* problem = nullptr;
  uint64_t count = 0;
  image_.l2().read(entries.slice, [&](const std::byte* slice) {
    const std::byte* at = slice + entries.position;
    for (; count < most; ++count, at += g.l2_entry_bytes()) {
      raw = qcow2::load_l2(at, g);
      const L2Entry entry = qcow2::decode_l2(raw, g, (cluster + count) << g.cluster_bits);
      problem = entry.problem;
      if (problem != nullptr) break;
      const bool has = entry.has_host || entry.compressed;
      if (count == 0) has_host = has;
      if (has != has_host) break;
    }
  });
  if (count == 0) throw image_.map().invalid_entry(cluster << g.cluster_bits, raw, problem);
  return count;
}

// Before any entry points to them.
void Qcow2Node::make_zero(uint64_t cluster, const qcow2::Allocator::Run& run, Preallocation how) {
  Edge& data = image_.data();
  if (image_.encryption() != nullptr) {
    // Zeroes on the disk are not zeroes to the guest.
    base::Buffer zeroes = base::Buffer::zeroed(geometry().cluster_size());
    for (uint64_t i = 0; i < run.clusters; ++i) {
      const uint64_t at = i << geometry().cluster_bits;
      image_.write_data(
          {.guest = (cluster << geometry().cluster_bits) + at, .host = run.offset + at},
          zeroes.io());
    }
    return;
  }
  const uint64_t length = run.clusters << geometry().cluster_bits;
  const uint64_t end = run.offset + length;
  if (how == Preallocation::kFalloc) {
    data.write_zeroes(run.offset, length, {.may_unmap = false});
  } else if (run.offset < data.size()) {
    data.write_zeroes(run.offset, std::min(end, data.size()) - run.offset, {.may_unmap = true});
  }
  // Entries must not point past the end of the file: its last byte makes it long enough, whoever
  // else makes it longer at the same time.
  if (end > data.size()) data.write_zeroes(end - 1, 1, {.may_unmap = false});
}

}  // namespace minivmm::block
