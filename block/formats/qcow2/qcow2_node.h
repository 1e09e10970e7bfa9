// SPDX-License-Identifier: Apache-2.0
// The qcow2 driver: versions 2 and 3, every cluster size and refcount width, extended L2 entries,
// external data files, backing files, compressed clusters, internal snapshots in the image (kept,
// written around). It can be resized while it is in use.
//
// Reads and writes of clusters that exist look up the L2 entry under a short lock and go straight
// to the file. A write to a cluster of which nothing exists claims it, takes a host cluster,
// writes old and new content to it in one go, and then sets the L2 entry; so do zeroing and
// discarding. Every request pins the node's epoch: a host cluster that has been dropped is not used
// again before all requests that could know it have ended.
//
// After a discard the whole clusters of the range read as zeroes; the rest of it is unchanged.
// (A version 2 image with a backing file cannot say so: there a discard does nothing.)
//
// Durability and the order of metadata on disk: commit.cc.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/epoch.h"
#include "base/sync.h"
#include "block/formats/qcow2/cluster_buffers.h"
#include "block/formats/qcow2/image.h"
#include "block/graph/driver.h"
#include "block/graph/edge.h"
#include "block/graph/node.h"

namespace minivmm::block {

class Qcow2Node final : public Node {
 public:
  struct Children {
    std::shared_ptr<Node> file;
    std::shared_ptr<Node> data;                               // only with an external data file
    std::shared_ptr<Node> backing;                            // may be empty
    std::unique_ptr<qcow2::Encryption> encryption = nullptr;  // only where the image has one
  };
  // See open_qcow2 for the checks that come before.
  Qcow2Node(const NodeConfig& config, Children children, qcow2::Header header,
            const qcow2::CacheSizes& sizes);
  ~Qcow2Node() override;

  std::string filename() const override;
  // qemu-img's format-specific information, in its order and with its names.
  Facts facts() const override;
  std::string state() const override;
  std::vector<Edge*> children() override;
  void close() override;
  DirtyBitmaps* dirty_bitmaps() noexcept override { return &image_.bitmaps(); }
  Snapshots* snapshots() noexcept override;

  // Adds or erases passwords of an encrypted image, while it is in use. Fiber. Throws EINVAL where
  // it is not encrypted, EROFS, and as crypto::amend_luks1.
  void amend_encryption(const crypto::Luks1AmendOptions& options);

  // See qcow2::Image. Before the first write.
  void set_lazy_refcounts(bool lazy) noexcept { image_.set_lazy_refcounts(lazy); }

  const qcow2::Header& header() const noexcept { return image_.file().header(); }
  // For tests and state dumps.
  const qcow2::Image& image() const noexcept { return image_; }

 protected:
  void driver_read(uint64_t offset, IoSpan to) override;
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override;
  bool driver_lend(uint64_t offset, uint64_t length, Loan& to) noexcept override;
  BlockStatus driver_block_status(uint64_t offset, uint64_t length) override;
  // While the disk is in use. What it grows by reads as zeroes. EINVAL unless a multiple of 512.
  void driver_truncate(uint64_t new_size) override;
  void driver_preallocate(uint64_t offset, uint64_t length, Preallocation how) override;
  // Between the files that hold the data. To whole clusters, but for the end of the disk.
  void driver_copy_range(uint64_t offset, uint64_t length, Edge& from,
                         uint64_t from_offset) override;
  void driver_copy_out(uint64_t offset, uint64_t length, const TakePiece& take) override;
  // Whole clusters, or up to the end of the disk: else EINVAL. What cannot be made smaller is
  // stored as it is. ENOTSUP with an external data file.
  void driver_write_compressed(uint64_t offset, IoSpan from) override;

 private:
  struct Plan;
  struct Surroundings;
  class SnapshotCommands;
  // Of guest offsets.
  struct Range {
    uint64_t begin = 0;
    uint64_t end = 0;
    uint64_t length() const noexcept { return end - begin; }
  };
  struct Zeroing;
  static std::unique_ptr<Edge> file_edge(const NodeConfig& config, std::shared_ptr<Node> file,
                                         const char* what);
  Edge& file() noexcept { return image_.file().file(); }
  const qcow2::Geometry& geometry() const noexcept { return image_.file().geometry(); }

  // qcow2_read.cc
  void read_extent(const qcow2::Extent& extent, uint64_t offset, IoSpan to);
  void read_backing(uint64_t offset, IoSpan to);
  bool data_may_be_holes();
  void look_into_file(BlockStatus& status);
  void read_compressed(const qcow2::Extent& extent, uint64_t guest_offset, IoSpan to);

  // qcow2_write.cc
  void write_range(uint64_t offset, IoSpan from);
  void require_inside(uint64_t offset, uint64_t length) const;
  uint64_t write_new(uint64_t offset, IoSpan from);
  uint64_t copy_new(uint64_t offset, uint64_t length, Edge& from, uint64_t from_offset);
  template <typename Fill>
  uint64_t fill_new(uint64_t offset, uint64_t length, Fill&& fill);
  Plan plan_write(uint64_t offset, uint64_t length, uint64_t count);
  bool extend(Plan& plan, const qcow2::L2Entry& entry, uint64_t end) const;
  void widen(Plan& plan) const;
  template <typename Fill>
  void carry_out(Plan& plan, Fill&& fill);
  void write_clusters(const Plan& plan, IoSpan from);
  void read_surroundings(const Plan& plan, Surroundings& out);
  void read_old(const qcow2::L2Entry& entry, uint64_t offset, std::span<std::byte> to);
  bool old_is_zero(const qcow2::L2Entry& entry, uint64_t offset, uint64_t length) const;
  void link(const Plan& plan);
  // At the beginning of every change, before what it changes can be seen.
  void before_change(uint64_t offset, uint64_t length) {
    image_.prepare_write();
    image_.bitmaps().mark(offset, length);
  }
  // At the end of every change, without a pin.
  void after_change(bool durable);
  // Frees what it made free, too: mostly in the background.
  void commit();
  void reclaim() noexcept;

  // qcow2_zero.cc
  Range whole_units(uint64_t offset, uint64_t length, uint64_t unit) const;
  void zero_range(Range range, ZeroFlags flags);
  void zero_part(Range range, ZeroFlags flags);
  void zero_data(const qcow2::Extent& extent, uint64_t offset, ZeroFlags flags);
  void zero_raw(uint64_t offset, uint64_t length, ZeroFlags flags);
  void punch_data(Range hole);
  // kForget: nothing is said of the range any more, it lies behind the end of the disk.
  enum class Emptying : uint8_t { kZero, kForget };
  void change_entries(Range range, ZeroFlags flags, Emptying what = Emptying::kZero);
  void change_in_slice(Range range, ZeroFlags flags, Emptying what);
  void change_claimed(Zeroing& work);
  uint64_t end_of_whole(Range range) const;
  bool is_empty(uint64_t cluster, Emptying what);
  qcow2::L2Entry zeroed(const qcow2::L2Entry& entry, uint32_t subclusters, bool unmap) const;
  bool can_zero_by_entry() const noexcept;
  // "Unallocated" means zeroes for good. Not where the image records a backing file and was opened
  // without it: the next to open it will see that file again.
  bool unallocated_is_zero() const noexcept { return !backing_ && !header().has_backing; }

  // qcow2_compress.cc
  void compress_cluster(uint64_t offset, IoSpan from, uint64_t at, uint64_t length);
  bool store_compressed(uint64_t offset, std::span<const std::byte> bytes);

  // qcow2_resize.cc
  void grow(uint64_t new_size);
  void shrink(uint64_t new_size, uint64_t old_size);
  void trim(uint64_t new_size);
  void zero_behind(Range range);
  void give_up_behind(uint64_t new_size, uint64_t old_size);

  // qcow2_preallocate.cc
  uint64_t preallocate_some(uint64_t cluster, uint64_t most, Preallocation how);
  uint64_t clusters_without_host(const qcow2::SliceRange& entries, uint64_t cluster, uint64_t most,
                                 bool& has_host);
  void make_zero(uint64_t cluster, const qcow2::Allocator::Run& run, Preallocation how);

  qcow2::Image image_;
  base::FiberMutex resizing_;
  // Where the disk ends, for those that pin the epoch. A resize sets it and then waits for the
  // pins that may not have seen it; size() follows when requests may come (growing), or goes ahead
  // of it when none may any more (shrinking).
  std::atomic<uint64_t> end_;
  std::unique_ptr<Edge> backing_;
  base::Epoch epoch_;
  qcow2::Claims claims_;
  qcow2::ClusterBuffers compress_buffers_;
  std::atomic<bool> reclaiming_{false};
  enum class SparseData : uint8_t { kUnknown, kNo, kYes };
  std::atomic<SparseData> sparse_data_{SparseData::kUnknown};
  base::WaitGroup background_;
  std::shared_ptr<Snapshots> snapshots_;  // made when it is asked for
};

// Fiber. Takes: file, data-file, backing, cache-size, l2-cache-size, refcount-cache-size,
// l2-cache-entry-size, lazy-refcounts, those of QEMU's about discards, overlap checks and cleaning
// that ask for what is done anyway; snapshot, snapshot-id, snapshot-name (one of the snapshots
// instead of the disk; read-only); of an encrypted image encrypt.key-secret, encrypt.unlock-time
// (as the driver `luks`).
std::shared_ptr<Node> open_qcow2(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
