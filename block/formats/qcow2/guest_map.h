// SPDX-License-Identifier: Apache-2.0
// From guest offsets to what is stored for them: the L1 table and the cached L2 slices.
//
// Owned by Image. Any loop, on fibers. A lookup of cached metadata does not suspend and does not
// allocate. Entries that make no sense are corruption: the lookup throws EIO.
#pragma once

#include <cstdint>
#include <optional>

#include "block/formats/qcow2/allocator.h"
#include "block/formats/qcow2/claims.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/l1_table.h"
#include "block/formats/qcow2/l2_entry.h"
#include "block/formats/qcow2/metadata_cache.h"
#include "block/formats/qcow2/overlap.h"
#include "block/formats/qcow2/quarantine.h"

namespace minivmm::block::qcow2 {

// A range of the guest's disk of one kind. kData and kZeroAllocated: contiguous in the file as
// well, from host_offset on (which is that of the first guest byte, not of its cluster).
// kCompressed: one cluster or a part of it; host_offset is where the compressed bytes begin.
struct Extent {
  ClusterKind kind = ClusterKind::kUnallocated;
  bool copied = false;
  uint64_t length = 0;
  uint64_t host_offset = 0;
  uint64_t compressed_bytes = 0;
};
// The extent that an entry describes: `length` bytes from guest offset `offset` on, which are of
// the kind of their first subcluster.
Extent extent_of(const L2Entry& entry, uint64_t offset, uint64_t length,
                 const Geometry& geometry) noexcept;

// A part of an L2 table that its holder may change: the entries of clusters [first_cluster, ...)
// from byte `position` of the slice at `slice`.
struct SliceRange {
  uint64_t slice = 0;
  uint64_t position = 0;
};

class GuestMap {
 public:
  GuestMap(ImageFile& image, L1Table& l1, MetadataCache& l2, Allocator& allocator,
           MetadataMap& metadata, Quarantine& quarantine);

  // What is at `offset`, for at most `max` bytes (both inside the disk). Never longer than what
  // one slice describes.
  Extent lookup(uint64_t offset, uint64_t max);
  // The same where the metadata is cached; nullopt: it is not, or it is invalid, which is lookup's
  // to say. Does not wait.
  std::optional<Extent> lookup_cached(uint64_t offset, uint64_t max) noexcept;
  // The same, going on over slices while the kind stays and the data is contiguous.
  Extent lookup_long(uint64_t offset, uint64_t max);

  // How many clusters, from this one on, have their entries in the same slice.
  uint64_t clusters_in_slice(uint64_t cluster) const noexcept {
    return slice_entries_ - (cluster & (slice_entries_ - 1));
  }
  // The key under which changes of a cluster's entry are claimed.
  uint64_t claim_group(uint64_t cluster) const noexcept { return cluster / slice_entries_; }

  // True if no L2 table describes the cluster.
  bool without_table(uint64_t cluster) const noexcept {
    return l1_.get(cluster >> image_.geometry().l2_bits()) == 0;
  }
  // Where the entry of a cluster can be changed; makes the L2 table, or a copy of one that is
  // shared with a snapshot, where needed. The caller holds a claim on the cluster.
  SliceRange writable(uint64_t cluster);

  // Gives up the L2 table of an L1 entry; none of its entries may hold anything, durably, and no
  // request may want it any more.
  void drop_table(uint64_t l1_index);

  // The error for an entry that makes no sense.
  base::Error invalid_entry(uint64_t guest_offset, RawL2 raw, const char* problem) const;

 private:
  // `read_slice(offset, visitor)` as MetadataCache::read_cached.
  template <typename ReadSlice>
  std::optional<Extent> find(uint64_t offset, uint64_t max, bool may_wait, ReadSlice&& read_slice);
  uint64_t table_of(uint64_t l1_index, uint64_t l1_entry) const;
  // The same, and throws EIO if other metadata lies there. Before a table is changed or freed.
  uint64_t known_table(uint64_t l1_index, uint64_t l1_entry) const;
  uint64_t writable_table(uint64_t l1_index);
  void make_table(uint64_t l1_index, uint64_t l1_entry);
  void fill_table(uint64_t offset, uint64_t l1_index, uint64_t l1_entry);
  uint64_t inside_file(const L2Entry& entry) const;
  SliceRange entry_in(uint64_t table, uint64_t cluster) const noexcept;

  ImageFile& image_;
  L1Table& l1_;
  MetadataCache& l2_;
  Allocator& allocator_;
  MetadataMap& metadata_;
  Quarantine& quarantine_;
  const uint64_t slice_entries_;
  Claims tables_;
};

}  // namespace minivmm::block::qcow2
