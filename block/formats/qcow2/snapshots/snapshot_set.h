// SPDX-License-Identifier: Apache-2.0
// The internal snapshots of an open image. A snapshot is an L1 table of its own; what it shares
// with the disk or with other snapshots has a refcount above 1, and no entry of the disk that
// refers to it says COPIED.
//
// Each change takes effect by one write of the header (tree_switch.h), so a crash leaves what was
// there before and leaks, or what there is afterwards:
//   create  the snapshot takes over the disk's L2 tables; the disk gets copies of them, in which no
//           cluster is its own.
//   apply   the disk gets copies of the snapshot's L2 tables, and gives up what it referred to.
//   remove  what the snapshot referred to is given up; clusters and tables that are the disk's
//   alone
//           from then on are marked so, in copies of its tables where they change.
// After an error everything is as it was, or writes are stopped.
//
// VM state that others keep in a snapshot, behind the end of its disk, lives and dies with it. It
// is not brought back by apply.
//
// Owned by Image. On a fiber, while no request of the image is in flight.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <optional>
#include <vector>

#include "base/epoch.h"
#include "block/formats/qcow2/l1_table.h"
#include "block/formats/qcow2/snapshots/tree_walk.h"
#include "block/formats/qcow2/tables.h"

namespace minivmm::block::qcow2 {

class Image;
class TreeSwitch;

class SnapshotSet {
 public:
  SnapshotSet(Image& image, L1Table& l1) : image_(image), l1_(l1) {}

  // Throws EINVAL for a list that makes no sense.
  const std::vector<SnapshotEntry>& entries();

  // `epoch` is that of the node's requests. `size` is the disk's. Returns the id.
  std::string create(std::string_view name, uint64_t size, base::Epoch& epoch);
  // Returns the disk's new size.
  uint64_t apply(std::string_view id_or_name, uint64_t size, base::Epoch& epoch);
  // The first of this name and id; an empty one means any.
  void remove(std::string_view name, std::string_view id, base::Epoch& epoch);

 private:
  struct List {
    uint64_t offset = 0;
    uint64_t clusters = 0;
  };
  std::string next_id() const;
  void settle(base::Epoch& epoch);
  uint64_t clusters_of(const L1Entries& l1) const;
  uint64_t take_l1(TreeSwitch& change, const L1Entries& l1) const;
  uint64_t l1_entries_for(uint64_t size) const;
  L1Entries active_l1() const;
  SnapshotEntry new_entry(std::string_view name, uint64_t size) const;
  List take_list(TreeSwitch& change, const std::vector<SnapshotEntry>& entries);
  void write_list(const List& list, const std::vector<SnapshotEntry>& entries);
  void use_list(const List& list, std::vector<SnapshotEntry> entries);
  void use_l1(uint64_t offset, const L1Entries& l1);
  void free(TreeSwitch& change, const L1Entries& lowered_tree) noexcept;

  Image& image_;
  L1Table& l1_;
  std::optional<std::vector<SnapshotEntry>> entries_;
  List list_;
};

}  // namespace minivmm::block::qcow2
