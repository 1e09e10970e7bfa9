// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/guest_map.h"

#include <algorithm>
#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"

namespace minivmm::block::qcow2 {
namespace {

// How many entries from the first on continue it: the same kind, contiguous host clusters.
uint64_t run_length(const std::byte* entries, uint64_t most, uint64_t raw,
                    uint64_t cluster_size) noexcept {
  if ((raw & kFlagCompressed) != 0) return 1;
  const uint64_t step = (raw & kOffsetMask) != 0 ? cluster_size : 0;
  uint64_t n = 1;
  while (n < most && base::load_be<uint64_t>(entries + n * 8) == raw + n * step) ++n;
  return n;
}

}  // namespace

GuestMap::GuestMap(ImageFile& image, L1Table& l1, MetadataCache& l2, Allocator& allocator,
                   MetadataMap& metadata, Quarantine& quarantine)
    : image_(image),
      l1_(l1),
      l2_(l2),
      allocator_(allocator),
      metadata_(metadata),
      quarantine_(quarantine),
      slice_entries_(l2.slice_size() / 8) {}

base::Error GuestMap::invalid_entry(uint64_t guest_offset, uint64_t raw,
                                    const char* problem) const {
  return image_.corruption(fmt::format("L2 entry {:#x} of guest offset {:#x} is invalid: {}", raw,
                                       guest_offset, problem));
}

L2Entry GuestMap::decode(uint64_t raw, uint64_t cluster) const {
  const L2Entry entry = decode_l2(raw, image_.geometry());
  if (entry.kind == ClusterKind::kInvalid) {
    throw invalid_entry(cluster << image_.geometry().cluster_bits, raw, entry.problem);
  }
  return entry;
}

uint64_t GuestMap::table_of(uint64_t l1_index, uint64_t l1_entry) const {
  if (const char* problem = l1_problem(l1_entry, image_.geometry())) {
    throw image_.corruption(
        fmt::format("L1 entry {} ({:#x}) is invalid: {}", l1_index, l1_entry, problem));
  }
  return l1_entry & kOffsetMask;
}

// Of `clusters` clusters of data from the entry on, those that begin inside the file.
uint64_t GuestMap::inside_file(const L2Entry& entry, uint64_t clusters) const {
  const uint64_t size = image_.size();
  if (entry.host_offset >= size) return 0;
  return std::min(clusters, image_.geometry().clusters(size - entry.host_offset));
}

Extent GuestMap::lookup(uint64_t offset, uint64_t max) {
  const Geometry& g = image_.geometry();
  const uint64_t l1_index = offset >> g.l1_shift();
  const uint64_t l1_entry = l1_.get(l1_index);
  Extent out;
  if (l1_entry == 0) {
    const uint64_t table_span = 1ULL << g.l1_shift();
    out.length = std::min(max, table_span - (offset & (table_span - 1)));
    return out;
  }
  const uint64_t cluster = offset >> g.cluster_bits;
  const uint64_t in_cluster = g.offset_in_cluster(offset);
  const uint64_t most = std::min(clusters_in_slice(cluster), g.clusters(in_cluster + max));
  const uint64_t position = (cluster & (g.l2_entries() - 1)) * 8;
  const uint64_t in_slice = position & (l2_.slice_size() - 1);
  uint64_t count = 0;
  l2_.read(table_of(l1_index, l1_entry) + (position - in_slice), [&](const std::byte* slice) {
    out.raw = base::load_be<uint64_t>(slice + in_slice);
    count = run_length(slice + in_slice, most, out.raw, g.cluster_size());
  });
  const L2Entry entry = decode(out.raw, cluster);
  if (entry.kind == ClusterKind::kData || entry.kind == ClusterKind::kCompressed) {
    count = inside_file(entry, count);
    if (count == 0) throw invalid_entry(offset, out.raw, "it lies past the end of the file");
  }
  out.kind = entry.kind;
  out.copied = entry.copied;
  out.host_offset =
      entry.kind == ClusterKind::kCompressed ? entry.host_offset : entry.host_offset + in_cluster;
  out.length = std::min(max, (count << g.cluster_bits) - in_cluster);
  return out;
}

Extent GuestMap::lookup_long(uint64_t offset, uint64_t max) {
  // A range that may be the whole disk (block status) is cut somewhere, not walked to its end.
  constexpr unsigned kMostSlices = 1024;
  Extent out = lookup(offset, max);
  for (unsigned n = 1; n < kMostSlices && out.length < max; ++n) {
    if (out.kind == ClusterKind::kCompressed) break;
    const Extent next = lookup(offset + out.length, max - out.length);
    if (next.kind != out.kind || next.copied != out.copied) break;
    const bool stored = out.kind == ClusterKind::kData || out.kind == ClusterKind::kZeroAllocated;
    if (stored && next.host_offset != out.host_offset + out.length) break;
    out.length += next.length;
  }
  return out;
}

SliceRange GuestMap::writable(uint64_t cluster) {
  const Geometry& g = image_.geometry();
  const uint64_t table = writable_table(cluster >> g.l2_bits());
  const uint64_t position = (cluster & (g.l2_entries() - 1)) * 8;
  const uint64_t in_slice = position & (l2_.slice_size() - 1);
  return {table + (position - in_slice), in_slice};
}

uint64_t GuestMap::writable_table(uint64_t l1_index) {
  uint64_t entry = l1_.get(l1_index);
  if ((entry & kFlagCopied) == 0) {
    const Claims::Claim claim(tables_, l1_index, l1_index, 1);
    entry = l1_.get(l1_index);
    if ((entry & kFlagCopied) == 0) {
      // The old table will be freed: not before it is known to be one.
      if (entry != 0) (void)known_table(l1_index, entry);
      make_table(l1_index, entry);
    }
    entry = l1_.get(l1_index);
  }
  return known_table(l1_index, entry);
}

uint64_t GuestMap::known_table(uint64_t l1_index, uint64_t entry) const {
  const uint64_t table = table_of(l1_index, entry);
  const char* there = metadata_.find(table >> image_.geometry().cluster_bits, 1);
  if (there != nullptr && there != kL2Table) {
    throw image_.corruption(
        fmt::format("L1 entry {} ({:#x}) points to the {}", l1_index, entry, there));
  }
  return table;
}

void GuestMap::make_table(uint64_t l1_index, uint64_t l1_entry) {
  const unsigned bits = image_.geometry().cluster_bits;
  const uint64_t old_table = table_of(l1_index, l1_entry);
  const Allocator::Run run = allocator_.allocate(1);
  std::exception_ptr error;
  try {
    fill_table(run.offset, l1_index, l1_entry);
  } catch (...) {
    error = std::current_exception();
  }
  if (error) {
    allocator_.give_back(run.offset, 1);
    std::rethrow_exception(error);
  }
  metadata_.add(run.offset >> bits, kL2Table);
  l1_.set(l1_index, run.offset | kFlagCopied);
  if (old_table != 0) quarantine_.add({old_table >> bits, 1});
}

// The table is whole on disk before the L1 entry is set in memory, so that no commit can make
// an entry durable that points to garbage.
void GuestMap::fill_table(uint64_t offset, uint64_t l1_index, uint64_t l1_entry) {
  const uint64_t cluster_size = image_.geometry().cluster_size();
  base::Buffer bytes = base::Buffer::zeroed(cluster_size);
  if (const uint64_t old_table = table_of(l1_index, l1_entry); old_table != 0) {
    if (old_table + cluster_size > image_.size()) {
      throw image_.corruption(
          fmt::format("L1 entry {} ({:#x}) points past the end of the file", l1_index, l1_entry));
    }
    image_.file().read(old_table, bytes.io());
  }
  image_.file().write(offset, bytes.io());
}

}  // namespace minivmm::block::qcow2
