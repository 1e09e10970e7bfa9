// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/bitmaps/bitmap_store.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"
#include "base/checked.h"
#include "block/formats/qcow2/listing.h"

namespace minivmm::block::qcow2 {
namespace {

constexpr uint64_t kAllOnes = 1;  // a table entry

bool all_are(std::span<const std::byte> bytes, std::byte value) {
  return std::all_of(bytes.begin(), bytes.end(), [&](std::byte b) { return b == value; });
}

}  // namespace

const char* bitmap_problem(const BitmapEntry& e, const Geometry& g, uint64_t disk_size,
                           uint64_t file_size) noexcept {
  constexpr uint32_t kKnownFlags = kBitmapInUse | kBitmapAuto | kBitmapExtraCompatible;
  if (e.type != kDirtyTracking) return "its type is unknown";
  if ((e.flags & ~kKnownFlags) != 0) return "it has unknown flags";
  if (e.extra_bytes != 0 && (e.flags & kBitmapExtraCompatible) == 0) {
    return "it has extra data that must be understood";
  }
  if (e.granularity_bits < kMinBitmapGranularityBits ||
      e.granularity_bits > kMaxBitmapGranularityBits) {
    return "its granularity is not between 512 bytes and 2 GiB";
  }
  const uint64_t data_bytes = uint64_t{e.table_size} << g.cluster_bits;
  if (e.table_size == 0 || data_bytes > kMaxBitmapBytes) return "its size is out of range";
  if (e.table_offset == 0 || g.offset_in_cluster(e.table_offset) != 0 ||
      !base::range_fits(e.table_offset, uint64_t{e.table_size} * 8, file_size)) {
    return "its table is misaligned or lies past the end of the file";
  }
  const uint64_t bits = base::div_ceil(disk_size, uint64_t{1} << e.granularity_bits);
  if (bits > data_bytes * 8) return "it is smaller than the disk";
  return nullptr;
}

std::vector<uint64_t> BitmapStore::read_table(const BitmapEntry& entry) {
  const Geometry& g = image_.geometry();
  base::Buffer bytes(uint64_t{entry.table_size} * 8);
  image_.file().read(entry.table_offset, bytes.io());
  std::vector<uint64_t> out(entry.table_size);
  for (size_t i = 0; i < out.size(); ++i) {
    const auto raw = base::load_be<uint64_t>(bytes.data() + i * 8);
    const uint64_t offset = raw & kOffsetMask;
    if ((raw & ~(kOffsetMask | kAllOnes)) != 0 || (offset != 0 && (raw & kAllOnes) != 0) ||
        g.offset_in_cluster(offset) != 0 || offset >= image_.size()) {
      throw base::Error(EINVAL, fmt::format("{}: entry {} ({:#x}) of the table of bitmap '{}' is "
                                            "invalid",
                                            image_.name(), i, raw, entry.name));
    }
    out[i] = raw;
  }
  return out;
}

void BitmapStore::read_bits(const BitmapEntry& entry, DirtyBits& to, uint64_t& memory_left) {
  const uint64_t cluster_size = image_.geometry().cluster_size();
  const std::vector<uint64_t> table = read_table(entry);
  base::Buffer bytes(cluster_size);
  for (uint64_t i = 0; i < table.size() && i * cluster_size < to.data_bytes(); ++i) {
    const uint64_t length = std::min(cluster_size, to.data_bytes() - i * cluster_size);
    if (table[i] == kAllOnes) to.load_ones(i * cluster_size, length);
    if (table[i] <= kAllOnes) continue;
    if (memory_left < length) {
      throw base::Error(EFBIG, image_.name() + ": its bitmaps take too much memory");
    }
    memory_left -= length;
    image_.file().read(table[i], bytes.io());
    to.load(i * cluster_size, bytes.span().first(length));
  }
}

std::vector<HostClusters> BitmapStore::clusters_of(const BitmapEntry& entry) {
  const Geometry& g = image_.geometry();
  std::vector<HostClusters> out{
      {entry.table_offset >> g.cluster_bits, g.clusters(uint64_t{entry.table_size} * 8)}};
  for (const uint64_t raw : read_table(entry)) {
    if (raw > kAllOnes) out.push_back({raw >> g.cluster_bits, 1});
  }
  return out;
}

uint64_t BitmapStore::take_together(uint64_t clusters) {
  const uint64_t offset = allocator_.allocate_together(clusters);
  taken_.push_back({offset, clusters, false});
  return offset;
}

// Whole clusters: what follows the bytes is zeroes.
void BitmapStore::write_at(uint64_t offset, std::span<const std::byte> bytes) {
  const Geometry& g = image_.geometry();
  base::Buffer whole = base::Buffer::zeroed(g.clusters(bytes.size()) << g.cluster_bits);
  std::copy(bytes.begin(), bytes.end(), whole.data());
  image_.file().write(offset, whole.io());
}

void BitmapStore::write_bits(const DirtyBits& bits, BitmapEntry& entry) {
  const Geometry& g = image_.geometry();
  const uint64_t cluster_size = g.cluster_size();
  const uint64_t entries = std::max<uint64_t>(g.clusters(bits.data_bytes()), 1);
  std::vector<std::byte> table(entries * 8);
  base::Buffer bytes(cluster_size);
  Allocator::Run room;
  for (uint64_t i = 0; i < entries; ++i) {
    bits.store(i * cluster_size, bytes.span());
    uint64_t raw = 0;
    if (all_are(bytes.span(), std::byte{0xff})) {
      raw = kAllOnes;
    } else if (!all_are(bytes.span(), std::byte{0})) {
      if (room.clusters == 0) {
        // As much as may still be needed, but not so much that a sparse bitmap hoards it.
        room = allocator_.allocate(std::min<uint64_t>(entries - i, 16));
        taken_.push_back(room);
      }
      raw = room.offset;
      room.offset += cluster_size;
      --room.clusters;
      image_.file().write(raw, bytes.io());
    }
    base::store_be(table.data() + i * 8, raw);
  }
  if (room.clusters != 0) {
    taken_.back().clusters -= room.clusters;
    if (taken_.back().clusters == 0) taken_.pop_back();
    allocator_.give_back(room.offset, room.clusters);
  }
  entry.table_offset = take_together(g.clusters(table.size()));
  entry.table_size = static_cast<uint32_t>(entries);
  write_at(entry.table_offset, table);
}

BitmapsExtension BitmapStore::write_directory(const std::vector<BitmapEntry>& entries) {
  std::vector<std::byte> bytes;
  for (const BitmapEntry& entry : entries) {
    const std::vector<std::byte> encoded = encode_bitmap(entry);
    bytes.insert(bytes.end(), encoded.begin(), encoded.end());
  }
  if (bytes.size() > kMaxListBytes) {
    throw base::Error(EFBIG, fmt::format("{}: the directory of its bitmaps would be longer than {} "
                                         "bytes",
                                         image_.name(), kMaxListBytes));
  }
  BitmapsExtension out;
  out.count = static_cast<uint32_t>(entries.size());
  out.directory_size = bytes.size();
  out.directory_offset = take_together(image_.geometry().clusters(bytes.size()));
  write_at(out.directory_offset, bytes);
  return out;
}

void BitmapStore::give_back() noexcept {
  for (const Allocator::Run& run : taken_) allocator_.give_back(run.offset, run.clusters);
  taken_.clear();
}

}  // namespace minivmm::block::qcow2
