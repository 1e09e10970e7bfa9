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

// How many subclusters from guest offset `offset`, in the first entry's cluster, on are alike and
// contiguous in the file; at most `most`.
uint64_t run_length(const std::byte* entries, uint64_t most, uint64_t offset, const Geometry& g) {
  const RawL2 raw = load_l2(entries, g);
  const unsigned sub = g.subcluster(offset);
  const uint64_t cluster = offset - g.offset_in_cluster(offset);
  const L2Entry first = decode_l2(raw, g, cluster);
  const unsigned n = g.subclusters();
  uint64_t run = first.same_kind(sub, n);
  if (first.compressed || first.problem != nullptr || sub + run < n) return std::min(most, run);
  // The entries that go on like a whole cluster of this kind. Their number is what matters: a
  // request may ask for a slice full of them, under a lock.
  const ClusterKind kind = first.kind(sub);
  const bool stored = kind == ClusterKind::kData || kind == ClusterKind::kZeroAllocated;
  const unsigned bytes = g.l2_entry_bytes();
  for (uint64_t i = 1; run < most; ++i) {
    const RawL2 next_raw = load_l2(entries + i * bytes, g);
    const RawL2 same{raw.entry + (stored ? i << g.cluster_bits : 0), raw.bitmap};
    if (n == 1 || sub == 0) {
      if (next_raw == same) {
        run += n;
        continue;
      }
      if (n == 1) break;
    }
    const L2Entry next = decode_l2(next_raw, g, cluster + (i << g.cluster_bits));
    if (next.kind(0) != kind) break;
    if (stored && (next.copied != first.copied ||
                   next.host_offset != first.host_offset + (i << g.cluster_bits))) {
      break;
    }
    const unsigned here = next.same_kind(0, n);
    run += here;
    if (here < n) break;
  }
  return std::min(most, run);
}

}  // namespace

Extent extent_of(const L2Entry& entry, uint64_t offset, uint64_t length,
                 const Geometry& g) noexcept {
  Extent out;
  out.kind = entry.kind(g.subcluster(offset));
  out.length = length;
  switch (out.kind) {
    case ClusterKind::kData:
    case ClusterKind::kZeroAllocated:
      out.copied = entry.copied;
      out.host_offset = entry.host_offset + g.offset_in_cluster(offset);
      break;
    case ClusterKind::kCompressed:
      out.host_offset = entry.host_offset;
      out.compressed_bytes = entry.compressed_bytes;
      break;
    default:
      break;
  }
  return out;
}

GuestMap::GuestMap(ImageFile& image, L1Table& l1, MetadataCache& l2, Allocator& allocator,
                   MetadataMap& metadata, Quarantine& quarantine)
    : image_(image),
      l1_(l1),
      l2_(l2),
      allocator_(allocator),
      metadata_(metadata),
      quarantine_(quarantine),
      slice_entries_(l2.slice_size() / image.geometry().l2_entry_bytes()) {}

base::Error GuestMap::invalid_entry(uint64_t guest_offset, RawL2 raw, const char* problem) const {
  const std::string bitmap =
      image_.geometry().extended_l2 ? fmt::format(" (bitmap {:#x})", raw.bitmap) : std::string();
  return image_.corruption(fmt::format("L2 entry {:#x}{} of guest offset {:#x} is invalid: {}",
                                       raw.entry, bitmap, guest_offset, problem));
}

uint64_t GuestMap::table_of(uint64_t l1_index, uint64_t l1_entry) const {
  if (const char* problem = l1_problem(l1_entry, image_.geometry())) {
    throw image_.corruption(
        fmt::format("L1 entry {} ({:#x}) is invalid: {}", l1_index, l1_entry, problem));
  }
  return l1_entry & kOffsetMask;
}

// How many clusters of data, from the entry's on, begin inside the file.
uint64_t GuestMap::inside_file(const L2Entry& entry) const {
  const uint64_t size = image_.size();
  return entry.host_offset >= size ? 0 : image_.geometry().clusters(size - entry.host_offset);
}

// Where in an L2 table the entry of a cluster is.
SliceRange GuestMap::entry_in(uint64_t table, uint64_t cluster) const noexcept {
  const Geometry& g = image_.geometry();
  const uint64_t position = (cluster & (g.l2_entries() - 1)) * g.l2_entry_bytes();
  const uint64_t in_slice = position & (l2_.slice_size() - 1);
  return {table + (position - in_slice), in_slice};
}

// Without `may_wait` what is invalid is not known either: to say so is written into the image.
template <typename ReadSlice>
std::optional<Extent> GuestMap::find(uint64_t offset, uint64_t max, bool may_wait,
                                     ReadSlice&& read_slice) {
  const Geometry& g = image_.geometry();
  const uint64_t l1_index = offset >> g.l1_shift();
  const uint64_t l1_entry = l1_.get(l1_index);
  if (l1_entry == 0) {
    const uint64_t table_span = 1ULL << g.l1_shift();
    Extent out;
    out.length = std::min(max, table_span - (offset & (table_span - 1)));
    return out;
  }
  if (!may_wait && l1_problem(l1_entry, g) != nullptr) return std::nullopt;
  const uint64_t cluster = offset >> g.cluster_bits;
  const uint64_t in_cluster = g.offset_in_cluster(offset);
  const uint64_t in_sub = offset & (g.subcluster_size() - 1);
  const unsigned sub = g.subcluster(offset);
  const uint64_t most = std::min(clusters_in_slice(cluster) * g.subclusters() - sub,
                                 ((in_sub + max - 1) >> g.subcluster_bits()) + 1);
  const SliceRange place = entry_in(table_of(l1_index, l1_entry), cluster);
  RawL2 raw;
  uint64_t count = 0;
  const bool known = read_slice(place.slice, [&](const std::byte* slice) {
    raw = load_l2(slice + place.position, g);
    count = run_length(slice + place.position, most, offset, g);
  });
  if (!known) return std::nullopt;
  const L2Entry entry = decode_l2(raw, g, offset - in_cluster);
  if (entry.problem != nullptr) {
    if (!may_wait) return std::nullopt;
    throw invalid_entry(offset, raw, entry.problem);
  }
  Extent out = extent_of(entry, offset, std::min(max, (count << g.subcluster_bits()) - in_sub), g);
  const bool stored = out.kind == ClusterKind::kData || out.kind == ClusterKind::kCompressed;
  if (stored && !g.external_data) {
    const uint64_t inside = inside_file(entry);
    if (inside == 0) {
      if (!may_wait) return std::nullopt;
      throw invalid_entry(offset, raw, "it lies past the end of the file");
    }
    out.length = std::min(out.length, (inside << g.cluster_bits) - in_cluster);
  }
  return out;
}

Extent GuestMap::lookup(uint64_t offset, uint64_t max) {
  return *find(offset, max, true, [this](uint64_t slice, auto&& visitor) {
    l2_.read(slice, visitor);
    return true;
  });
}

std::optional<Extent> GuestMap::lookup_cached(uint64_t offset, uint64_t max) noexcept {
  return find(offset, max, false,
              [this](uint64_t slice, auto&& visitor) { return l2_.read_cached(slice, visitor); });
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
  return entry_in(writable_table(cluster >> image_.geometry().l2_bits()), cluster);
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

void GuestMap::drop_table(uint64_t l1_index) {
  const Claims::Claim claim(tables_, l1_index, l1_index, 1);
  const uint64_t entry = l1_.get(l1_index);
  if (entry == 0) return;
  const uint64_t table = known_table(l1_index, entry);
  l1_.set(l1_index, 0);
  quarantine_.add({table >> image_.geometry().cluster_bits, 1});
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
