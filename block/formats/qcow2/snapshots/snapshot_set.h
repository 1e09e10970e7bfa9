// SPDX-License-Identifier: Apache-2.0
// The internal snapshots of an open image. A snapshot is an L1 table of its own; what it shares
// with the disk or with other snapshots has a refcount above 1, and no entry of the disk that
// refers to it says COPIED.
//
// The orders, each step durable before the next, so that nothing is ever written to that a snapshot
// refers to, and what a crash leaves is that some refcounts are too high, and flags that say less
// or more than such refcounts do: both are mended by `check -r leaks`, neither harms a disk in use.
//   create  refcounts of all that the disk refers to go up; the COPIED flags of its entries go; the
//           new L1 table and the new list are written; the header points to the list.
//   apply   refcounts of all that the snapshot refers to go up, and the COPIED flags of its tables
//           go; a copy of its L1 table is written; the header points to it and has its disk's size,
//           in one write; what the disk referred to before goes through the quarantine; COPIED is
//           set where a refcount is 1 again.
//   remove  the list without it is written; the header points to that; what it referred to goes
//           through the quarantine; COPIED is set where a refcount is 1 again.
// After an error the header points to what it did before; refcounts and flags are put back as far
// as that is possible.
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
class MetadataMap;
class Quarantine;
class Refcounts;

class SnapshotSet {
 public:
  struct Parts {
    L1Table& l1;
    Refcounts& refcounts;
    MetadataMap& metadata;
    Quarantine& quarantine;
  };
  SnapshotSet(Image& image, Parts parts) : image_(image), parts_(parts) {}

  // Throws EINVAL for a list that makes no sense.
  const std::vector<SnapshotEntry>& entries();

  // `epoch` is that of the node's requests. `size` is the disk's. Returns the id.
  std::string create(std::string_view name, uint64_t size, base::Epoch& epoch);
  // Returns the disk's new size.
  uint64_t apply(std::string_view id_or_name, uint64_t size, base::Epoch& epoch);
  void remove(std::string_view name, base::Epoch& epoch);

 private:
  struct List {
    uint64_t offset = 0;
    uint64_t clusters = 0;
  };
  std::string next_id() const;
  List list_on_disk() const;
  // snapshot_set.cc
  void settle(base::Epoch& epoch);
  L1Entries active_l1(uint64_t entries) const;
  uint64_t l1_entries_for(uint64_t size) const;
  uint64_t write_l1(const L1Entries& entries);
  List write_list(const std::vector<SnapshotEntry>& entries);
  void switch_list(const List& list, size_t count);
  // After the header's change: what goes wrong only leaks.
  template <typename Work>
  void tidy_up(const Work& work) noexcept;
  void give_back(uint64_t offset, uint64_t clusters) noexcept;

  // snapshot_refs.cc
  void raise_tree(const L1Entries& l1);
  void lower_again(const L1Entries& l1, uint64_t references) noexcept;
  void release_tree(const L1Entries& l1, base::Epoch& epoch);
  void release_table(HostClusters clusters);
  void clear_active_flags();
  void clear_flags_in_file(const L1Entries& l1);
  void refresh_flags();
  void refresh_table(uint64_t l1_index, uint64_t table);

  Image& image_;
  const Parts parts_;
  std::optional<std::vector<SnapshotEntry>> entries_;
  List list_;
};

}  // namespace minivmm::block::qcow2
