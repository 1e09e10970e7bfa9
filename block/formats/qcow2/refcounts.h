// SPDX-License-Identifier: Apache-2.0
// The refcounts of an image's host clusters: the refcount table in memory, the blocks through the
// cache. Changes are made in memory here; a commit writes them (commit.cc has the order and why).
//
// Owned by Image. Any loop, on fibers. The table is loaded before the first change.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "base/sync.h"
#include "block/formats/qcow2/free_runs.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/metadata_cache.h"
#include "block/formats/qcow2/overlap.h"

namespace minivmm::block::qcow2 {

class Refcounts {
 public:
  Refcounts(ImageFile& image, MetadataCache& cache, MetadataMap& map);

  // Reads and checks the refcount table. Once, before anything else. Throws EIO.
  void load_table();

  // The refcount of a cluster; 0 where there is no block for it.
  uint64_t get(uint64_t cluster);
  // Sets 0 to 1, cluster by cluster from `first`, until one is not 0. Returns how many. Atomic for
  // each cluster: of two takers one gets it.
  uint64_t take_free(uint64_t first, uint64_t count);
  // Raises the refcounts of a run of clusters in use by 1 each. False: one cannot go higher, and
  // nothing has changed. Throws EIO if one is 0, and what reading them throws; then likewise.
  bool raise(uint64_t first, uint64_t count);
  // Lowers a cluster's refcount by 1; returns what it is then. Throws EIO if it was 0.
  uint64_t lower(uint64_t cluster);
  // The same for a run whose refcounts are all 1 by the caller's knowledge.
  void free_run(uint64_t first, uint64_t count);

  // --- Only the allocator's refill, one at a time ---
  uint64_t table_entries() const;
  // The free clusters that block `index` describes, found by reading it or, where there is none,
  // by making it. Throws ENOSPC and such; then nothing has changed.
  void find_free(uint64_t index, FreeRuns& out);
  // Makes the table larger and adds what became free. Returns the index after the last block made.
  // EFBIG at its limit.
  uint64_t grow_table(FreeRuns& out);
  // Makes blocks behind all others for `clusters` adjacent ones, which have refcount 1 then;
  // returns the first. Adds what is free beside them. EFBIG.
  uint64_t make_area(uint64_t clusters, FreeRuns& out);

  // --- A copy of all, beside them (TreeSwitch); while nothing is allocated ---
  struct TablePlace {
    uint64_t offset = 0;
    uint64_t clusters = 0;
  };
  struct Tables : TablePlace {
    std::vector<uint64_t> blocks = {};  // the table's entries
    std::vector<uint32_t> dirty = {};
  };
  TablePlace table_place();
  // How many there are.
  uint64_t blocks() const;
  // Writes copies of the blocks to `blocks` and of the table to `table`, and uses them from now on:
  // the header still points to the old ones, which are returned. After an error nothing has
  // changed.
  Tables use_copy(uint64_t table, const std::vector<uint64_t>& blocks);
  // Uses others; returns those that were in use.
  Tables exchange(Tables other);
  // Those that are not in use will not be again.
  void forget(const Tables& other) noexcept;

  // --- The commit; one at a time ---
  using TableChanges = std::vector<std::pair<uint32_t, uint64_t>>;  // by index
  TableChanges take_dirty_table();
  void write_table(const TableChanges& changes);
  void failed(const TableChanges& changes);

 private:
  struct Place {
    uint64_t slice = 0;  // offset in the file; 0: no block
    uint64_t index = 0;  // of the entry within the slice
  };
  struct Growth;
  Place place(uint64_t cluster);
  uint64_t raise_in_slice(uint64_t first, uint64_t count, std::optional<uint64_t>& stopped_at);
  uint64_t table_entry(uint64_t index) const;
  void scan_block(uint64_t index, uint64_t block_offset, FreeRuns& out);
  void make_block(uint64_t index, FreeRuns& out);
  Growth plan_growth() const;
  void write_growth(const Growth& growth);
  void write_blocks(const Growth& growth);
  uint64_t blocks_end() const;
  void copy_block(uint64_t from, uint64_t to);

  ImageFile& image_;
  MetadataCache& cache_;
  MetadataMap& map_;
  const unsigned order_;
  const uint64_t slice_entries_;

  // Held while the table on disk is written: a commit's entries and a move of the whole table
  // must not cross.
  base::FiberMutex table_io_;
  mutable std::mutex mutex_;
  std::vector<uint64_t> table_;        // guarded by mutex_
  std::vector<uint32_t> dirty_table_;  // guarded by mutex_
  uint64_t table_offset_;              // guarded by table_io_
  uint64_t table_clusters_;            // guarded by table_io_
};

}  // namespace minivmm::block::qcow2
