// SPDX-License-Identifier: Apache-2.0
// One change of everything that the header points to: the disk's L1 table and L2 tables, the list
// of snapshots, and the refcounts of all clusters. COPIED flags and refcounts have to say the same,
// and no order of writes in place keeps them doing so; hence nothing that is in use is written to.
// New tables and a copy of the refcounts are made beside the old ones, and one write of one sector
// of the header goes over to them. A crash before that leaves the old state, and what was made
// leaked; after it, exactly the new state.
//
// On the stack of the fiber that does the work, while no request of the image is in flight and
// nothing waits for a commit. The order of calls is that of the declarations. Destroyed before
// finish() it undoes everything.
#pragma once

#include <cstdint>
#include <vector>

#include "base/buffer.h"
#include "block/formats/qcow2/allocator.h"
#include "block/formats/qcow2/header_update.h"
#include "block/formats/qcow2/refcounts.h"
#include "block/formats/qcow2/snapshots/tree_walk.h"

namespace minivmm::block::qcow2 {

class Image;

class TreeSwitch {
 public:
  explicit TreeSwitch(Image& image) : image_(image) {}
  ~TreeSwitch();
  TreeSwitch(const TreeSwitch&) = delete;
  TreeSwitch& operator=(const TreeSwitch&) = delete;

  // Adjacent clusters for a new table; returns the offset.
  uint64_t take(uint64_t clusters);
  // Room for so many new L2 tables.
  void take_l2_tables(uint64_t count);
  // Makes the copy of the refcounts: from here on it is what counts, and nothing more can be taken.
  void copy_refcounts();

  // One reference more to each cluster of the guest's that the tables of `l1` refer to. Throws
  // EFBIG where refcounts are too narrow.
  void raise_data(const L1Entries& l1);
  // One reference less to all that `l1` refers to, L2 tables too.
  void lower_tree(const L1Entries& l1);
  // The same for clusters that a table of another kind takes, which is not used any more.
  void lower(uint64_t offset, uint64_t clusters);
  // A copy of an L2 table, none of whose clusters is the disk's alone. Returns the L1 entry for it.
  uint64_t copy_shared_table(uint64_t l1_entry);
  // The L1 entry for the same table of the disk, or for a copy that takes its place, with COPIED
  // flags that say what the refcounts say by now.
  uint64_t refresh_table(uint64_t l1_index, uint64_t l1_entry);
  void write_table(uint64_t offset, const L1Entries& entries);

  // Goes over; `change` is what the header says besides. After an error it says what it did before,
  // or writes are stopped.
  void finish(const HeaderUpdate::Change& change);
  // Gives space back: what lower() brought to 0, and of what these trees refer to likewise. Throws;
  // what is left out is found as free sooner or later.
  void free(const L1Entries& lowered_tree);

 private:
  void put_back(uint64_t offset) noexcept;
  void load_table(uint64_t l1_entry);
  uint64_t write_copy();
  void collect(uint64_t first, uint64_t count, ClusterRun& run);

  Image& image_;
  std::vector<Allocator::Run> taken_;
  std::vector<uint64_t> l2_tables_;  // offsets, of those that are still to be had
  Refcounts::Tables other_;          // the refcounts that are not in use: first the copy's room
  bool copied_ = false;
  bool switching_ = false;
  bool finished_ = false;
  std::vector<ClusterRun> lowered_;
  base::Buffer bytes_;  // an L2 table
};

}  // namespace minivmm::block::qcow2
