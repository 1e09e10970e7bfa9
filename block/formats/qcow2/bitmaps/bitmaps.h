// SPDX-License-Identifier: Apache-2.0
// The persistent dirty bitmaps of an open image.
//
// Those with the flag "auto" note changes of the disk. Before the first change of an image, each of
// them is marked in use on disk, durably: whoever opens the image after a crash knows that it may
// have missed something. store(), at the end, writes what has changed to new clusters and a
// directory without the marks, makes that durable, points the header at it, and frees the old
// clusters; a crash in between leaves the marked ones and leaks.
//
// A directory that makes no sense keeps nobody from using the disk: then the autoclear bit is
// cleared by the first change, as by a program that knows no bitmaps. A single bitmap that cannot
// be read stays as it is, marked in use.
//
// Owned by Image. Any loop, on fibers; mark() does not suspend.
#pragma once

#include <string>
#include <string_view>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/epoch.h"
#include "base/sync.h"
#include "block/formats/qcow2/bitmaps/bitmap_store.h"
#include "block/formats/qcow2/bitmaps/dirty_bits.h"
#include "block/formats/qcow2/tables.h"
#include "block/graph/dirty_bitmaps.h"

namespace minivmm::block::qcow2 {

class Image;

// In memory, of all bitmaps of an image: so much of their bits may be other than zero.
inline constexpr uint64_t kMostBitmapMemory = 1ULL << 30;

class Bitmaps final : public DirtyBitmaps {
 public:
  // Reads the directory.
  Bitmaps(Image& image, Allocator& allocator);
  ~Bitmaps();

  // The autoclear bit stays true. Before the first change.
  bool maintained() const noexcept { return maintained_; }
  void before_first_write();

  // A change of this range begins.
  void mark(uint64_t offset, uint64_t length) {
    if (tracked_.load(std::memory_order_acquire) != nullptr) mark_tracked(offset, length);
  }

  // The disk gets another size. Before its size in the header changes: all bitmaps are read and
  // marked in use. Then, when it grows before and when it shrinks after the header changed, they
  // take the new size.
  void prepare_resize();
  void resize(uint64_t disk_size);

  // Writes what has changed. Nothing writes to the disk any more. Throws; then the bitmaps stay
  // marked in use.
  void store();

  std::vector<Info> list() const override;
  Status status(std::string_view name, uint64_t offset, uint64_t length) override;
  void add(std::string_view name, uint64_t granularity, bool enabled) override;
  void remove(std::string_view name) override;
  void clear(std::string_view name) override;
  void set_enabled(std::string_view name, bool enabled) override;
  void merge(std::string_view name, DirtyBitmaps& from, std::string_view other) override;

 private:
  struct Bitmap {
    BitmapEntry entry;      // as on disk, where it is on disk
    uint64_t position = 0;  // of the entry in the directory
    bool on_disk = false;
    bool marked = false;  // in use, by us
    bool inconsistent = false;
    bool enabled = false;
    bool changed = false;             // other than on disk
    std::unique_ptr<DirtyBits> bits;  // where they were needed so far
  };
  using Tracked = std::vector<DirtyBits*>;

  void read_directory();
  Bitmap read_entry(std::span<const std::byte> directory, uint64_t& position) const;
  Bitmap& find(std::string_view name);
  Bitmap& find_consistent(std::string_view name);
  void require_changeable() const;
  void check_new(std::string_view name, uint64_t granularity) const;
  void mark_tracked(uint64_t offset, uint64_t length);
  // The bits of a bitmap that was not read yet.
  DirtyBits& bits_of(Bitmap& bitmap);
  bool try_bits_of(Bitmap& bitmap) noexcept;
  bool mark_in_use(Bitmap& bitmap);
  void mark_in_use(bool all);
  // What the image says of it is not true from now on: a crash must not bring that back.
  void before_change(Bitmap& bitmap);
  // Makes mark() know which are enabled; `also` is marked beside them. What mark() knew before is
  // not used any more when this returns.
  void publish(const std::vector<DirtyBits*>& also = {});
  // Where they lie on disk is kept from being written over.
  void guard_places();
  bool nothing_to_store() const;
  void collect_old(std::vector<HostClusters>& out, const BitmapEntry& entry);
  std::vector<BitmapEntry> write_all();
  void switch_header(const std::optional<BitmapsExtension>& extension);

  Image& image_;
  BitmapStore store_;
  bool maintained_ = false;
  const char* problem_ = nullptr;  // of the directory
  uint64_t memory_left_ = kMostBitmapMemory;

  mutable base::FiberMutex changing_;
  std::vector<std::unique_ptr<Bitmap>> bitmaps_;  // guarded by changing_, as are the next three
  std::vector<BitmapEntry> removed_;              // on disk, to be freed
  std::optional<BitmapsExtension> extension_;     // of the directory on disk
  bool header_differs_ = false;
  uint64_t disk_size_;

  std::atomic<const Tracked*> tracked_{nullptr};
  base::Epoch marking_;
};

}  // namespace minivmm::block::qcow2
