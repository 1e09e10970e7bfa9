// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/listing.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/error.h"

namespace minivmm::block::qcow2 {
namespace {

using base::Error;

// One table's walk: entries of variable length, one after the other.
class TableReader {
 public:
  TableReader(Edge& file, const char* what, uint64_t begin, uint64_t end)
      : file_(file), what_(what), begin_(begin), at_(begin), end_(end) {}

  // The next `bytes` of the table, without moving on.
  base::Buffer peek(uint64_t bytes) {
    if (!base::range_fits(at_, bytes, end_)) {
      throw Error(EINVAL, fmt::format("{}: the entry at {:#x} reaches past the end", what_, at_));
    }
    base::Buffer out(bytes);
    file_.read(at_, out.io());
    return out;
  }
  void move_on(uint64_t bytes) {
    at_ += bytes;
    if (at_ - begin_ > kMaxListBytes) {
      throw Error(EINVAL, fmt::format("{}: longer than {} bytes", what_, kMaxListBytes));
    }
  }
  Error too_long() const {
    return Error(EINVAL, fmt::format("{}: the entry at {:#x} is too long", what_, at_));
  }

 private:
  Edge& file_;
  const char* const what_;
  const uint64_t begin_;
  uint64_t at_;
  const uint64_t end_;
};

}  // namespace

std::vector<SnapshotEntry> read_snapshots(Edge& file, const Header& header) {
  std::vector<SnapshotEntry> out;
  TableReader table(file, "snapshot table", header.snapshots_offset, file.size());
  for (uint32_t i = 0; i < header.snapshots; ++i) {
    SnapshotEntry entry = decode_snapshot_sizes(table.peek(kSnapshotFixedBytes).span());
    if (entry.extra_bytes > kMaxSnapshotExtraBytes) throw table.too_long();
    // The last entry's padding may be missing.
    const uint64_t bytes =
        kSnapshotFixedBytes + uint64_t{entry.extra_bytes} + entry.id_bytes + entry.name_bytes;
    decode_snapshot_rest(table.peek(bytes).span(), entry);
    table.move_on(entry.total_bytes());
    out.push_back(std::move(entry));
  }
  return out;
}

std::vector<BitmapEntry> read_bitmaps(Edge& file, const Header& header) {
  std::vector<BitmapEntry> out;
  if (!header.bitmaps || (header.autoclear & kAutoclearBitmaps) == 0) return out;
  const BitmapsExtension& e = *header.bitmaps;
  TableReader table(file, "bitmap directory", e.directory_offset,
                    e.directory_offset + e.directory_size);
  for (uint32_t i = 0; i < e.count; ++i) {
    BitmapEntry entry = decode_bitmap(table.peek(kBitmapFixedBytes).span());
    if (entry.name_bytes > kMaxBitmapNameBytes || entry.extra_bytes > kMaxSnapshotExtraBytes ||
        entry.granularity_bits > 31) {
      throw table.too_long();
    }
    const uint64_t bytes = kBitmapFixedBytes + uint64_t{entry.extra_bytes} + entry.name_bytes;
    decode_bitmap_name(table.peek(bytes).span(), entry);
    table.move_on(entry.total_bytes());
    out.push_back(std::move(entry));
  }
  return out;
}

}  // namespace minivmm::block::qcow2
