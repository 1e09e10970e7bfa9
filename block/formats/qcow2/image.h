// SPDX-License-Identifier: Apache-2.0
// One open qcow2 image: its parts, put together, and the steps of its life (first write, commit,
// reclaim, close). What guests see is qcow2_node.h's; this knows only host clusters.
//
// Owned by Qcow2Node. Any loop, on fibers.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

#include "base/epoch.h"
#include "base/sync.h"
#include "block/formats/qcow2/allocator.h"
#include "block/formats/qcow2/bitmaps/bitmaps.h"
#include "block/formats/qcow2/byte_allocator.h"
#include "block/formats/qcow2/commit.h"
#include "block/formats/qcow2/encryption.h"
#include "block/formats/qcow2/guest_map.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/l1_table.h"
#include "block/formats/qcow2/metadata_cache.h"
#include "block/formats/qcow2/overlap.h"
#include "block/formats/qcow2/quarantine.h"
#include "block/formats/qcow2/refcounts.h"
#include "block/formats/qcow2/snapshots/snapshot_set.h"
#include "block/formats/qcow2/write_behind.h"

namespace minivmm::block::qcow2 {

// Bytes. QEMU's options of the same names.
struct CacheSizes {
  uint64_t l2 = 0;
  uint64_t refcount = 0;
  uint32_t l2_entry = 0;  // the size of an L2 slice
};
// Fills in what was not given and checks the rest against the image. `total` is cache-size.
// Throws EINVAL naming the option.
CacheSizes choose_cache_sizes(const Header& header, std::optional<uint64_t> total,
                              std::optional<uint64_t> l2, std::optional<uint64_t> refcount,
                              std::optional<uint64_t> l2_entry);

class Image {
 public:
  // Reads the L1 table. `name` begins every message. `data` is the external data file, where the
  // image has one.
  Image(std::unique_ptr<Edge> file, std::unique_ptr<Edge> data,
        std::unique_ptr<Encryption> encryption, Header header, bool writable, std::string name,
        const CacheSizes& sizes);

  ImageFile& file() noexcept { return file_; }
  const ImageFile& file() const noexcept { return file_; }
  GuestMap& map() noexcept { return map_; }
  MetadataCache& l2() noexcept { return l2_; }
  const MetadataCache& l2() const noexcept { return l2_; }
  const MetadataCache& refcount_blocks() const noexcept { return blocks_; }
  Allocator& allocator() noexcept { return allocator_; }
  const Allocator& allocator() const noexcept { return allocator_; }
  // For compressed clusters. Closed before the last commit.
  ByteAllocator& bytes() noexcept { return bytes_; }
  // What else lies in the image is told to it: nothing is written over that.
  MetadataMap& metadata() noexcept { return metadata_; }
  Refcounts& refcounts() noexcept { return refcounts_; }
  const Quarantine& quarantine() const noexcept { return quarantine_; }
  Bitmaps& bitmaps() noexcept { return bitmaps_; }
  SnapshotSet& snapshots() noexcept { return snapshots_; }
  uint64_t commits() const { return committer_.commits(); }

  // Other than the image says. Before the first write. Not for version 2.
  void set_lazy_refcounts(bool lazy) noexcept { lazy_refcounts_ = lazy; }
  // Before each change. The first one marks bitmaps as in use, clears autoclear bits and loads what
  // writing needs; all throw EIO once corruption was found.
  void prepare_write() {
    if (!ready_to_write_.load(std::memory_order_acquire)) prepare_first_write();
    if (file_.broken()) file_.require_intact();
  }
  // --- Where the guest's data lies: clusters of the image, or the external data file ---
  Edge& data() noexcept { return data_ ? *data_ : file_.file(); }
  // The guest's bytes there. All of its data passes here, encrypted on the disk where the image is.
  void read_data(Encryption::Place place, IoSpan to);
  void write_data(Encryption::Place place, IoSpan from);
  // The same for clusters that were just allocated.
  void write_new_data(Encryption::Place place, IoSpan from);
  // nullptr: the image is not encrypted.
  Encryption* encryption() const noexcept { return encryption_.get(); }
  // nullptr: in the image.
  Edge* data_file() const noexcept { return data_.get(); }
  // Room for 1 to `max` clusters of the guest's, from this one on. See Allocator.
  Allocator::Run allocate_data(uint64_t guest_cluster, uint64_t max);
  void give_back_data(const Allocator::Run& run) noexcept;
  // Before data is written to host clusters that exist. Throws EIO if metadata lies there.
  void require_data(uint64_t host_offset, uint64_t length);
  // Gives up the guest's reference to host clusters, after the L2 entry was changed in memory.
  void drop(HostClusters clusters);

  // See Committer. With nothing changed it is one flush of the file.
  void commit() { committer_.commit(); }
  // After the last request: frees what is to be freed, commits, and takes the dirty bit away that
  // lazy refcounts needed. `epoch` as for reclaim().
  void finish(base::Epoch& epoch);
  // Makes the L1 table that large at least, while it is in use. Durable on return. One at a time;
  // the caller does not pin `epoch`. EFBIG where there can be none.
  void grow_l1(uint64_t entries, base::Epoch& epoch);
  uint32_t l1_size() const noexcept { return l1_.size(); }

  // Writers should commit: much is waiting for it.
  bool under_pressure() const noexcept;
  // Frees what a commit made free: waits for the requests that could know it (of `epoch`, which
  // the caller does not pin), punches holes, lowers refcounts. When it returns, all is done that
  // had matured before.
  void reclaim(base::Epoch& epoch);
  // Punches holes where clusters lie that nothing refers to any more, durably, and makes them free.
  // After an error part of them is.
  void free_unused(ClusterRun run);
  // So much waits for a reclaim that whoever commits should do it.
  bool much_to_reclaim() const noexcept { return is_much(quarantine_.matured()); }

 private:
  void prepare_first_write();
  void know_snapshots();
  bool is_much(uint64_t clusters) const noexcept;
  void switch_l1(uint64_t offset, uint32_t entries, L1Table::Entries& array);
  void release(const Quarantine::Runs& runs);
  void release_one(uint64_t cluster, ClusterRun& free);

  ImageFile file_;
  const std::unique_ptr<Edge> data_;
  const std::unique_ptr<Encryption> encryption_;
  MetadataMap metadata_;
  MetadataCache l2_;
  MetadataCache blocks_;
  L1Table l1_;
  Refcounts refcounts_;
  Allocator allocator_;
  ByteAllocator bytes_;
  WriteBehind write_behind_;
  Quarantine quarantine_;
  GuestMap map_;
  Committer committer_;
  Bitmaps bitmaps_;
  SnapshotSet snapshots_;
  std::atomic<bool> ready_to_write_{false};
  base::FiberMutex preparing_;
  base::FiberMutex reclaiming_;
  bool refcounts_loaded_ = false;  // guarded by preparing_
  bool lazy_refcounts_;            // constant from the first write on
};

}  // namespace minivmm::block::qcow2
