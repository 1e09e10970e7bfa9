// SPDX-License-Identifier: Apache-2.0
// Bitmaps in the file: reads the table and the bits of one, writes bits and the directory to new
// clusters. Nothing is changed in place: the caller points the header at a new directory once all
// of it is durable, and then frees the old clusters.
//
// Used by Bitmaps, one fiber at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "block/formats/qcow2/allocator.h"
#include "block/formats/qcow2/bitmaps/dirty_bits.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/l2_entry.h"
#include "block/formats/qcow2/tables.h"

namespace minivmm::block::qcow2 {

// Why the bits of a bitmap cannot be read or its entry is not understood, or nullptr. Does not look
// at the in-use flag; `disk_size` 0: of an unknown disk.
const char* bitmap_problem(const BitmapEntry& entry, const Geometry& geometry, uint64_t disk_size,
                           uint64_t file_size) noexcept;

class BitmapStore {
 public:
  BitmapStore(ImageFile& image, Allocator& allocator) : image_(image), allocator_(allocator) {}

  // Of an entry without a problem. Throw EINVAL for tables that make no sense. `memory_left` is
  // how many bytes of bits other than zero may be read, now and later: EFBIG.
  void read_bits(const BitmapEntry& entry, DirtyBits& to, uint64_t& memory_left);
  // The table's clusters and those of the bits.
  std::vector<HostClusters> clusters_of(const BitmapEntry& entry);

  // Sets the table in `entry`. After an error: give_back().
  void write_bits(const DirtyBits& bits, BitmapEntry& entry);
  // At least one. Throws EFBIG for a directory that no reader accepts.
  BitmapsExtension write_directory(const std::vector<BitmapEntry>& entries);
  // What was written since the last call is in use now, or it is not and never will be.
  void keep() noexcept { taken_.clear(); }
  void give_back() noexcept;

 private:
  std::vector<uint64_t> read_table(const BitmapEntry& entry);
  uint64_t take_together(uint64_t clusters);
  void write_at(uint64_t offset, std::span<const std::byte> bytes);

  ImageFile& image_;
  Allocator& allocator_;
  std::vector<Allocator::Run> taken_;
};

}  // namespace minivmm::block::qcow2
