// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/snapshots/snapshot_view.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "block/formats/qcow2/listing.h"

namespace minivmm::block::qcow2 {

using base::Error;

namespace {

using Entries = std::vector<SnapshotEntry>;

Entries::const_iterator find(const Entries& all, const SnapshotName& name) {
  if (!name.either) {
    return std::find_if(all.begin(), all.end(), [&](const SnapshotEntry& entry) {
      return (!name.id || entry.id == *name.id) && (!name.name || entry.name == *name.name);
    });
  }
  const auto it = std::find_if(
      all.begin(), all.end(), [&](const SnapshotEntry& entry) { return entry.id == *name.either; });
  if (it != all.end()) return it;
  return std::find_if(all.begin(), all.end(),
                      [&](const SnapshotEntry& entry) { return entry.name == *name.either; });
}

}  // namespace

Header header_of_snapshot(Edge& file, const Header& header, const SnapshotName& name) {
  const Entries all = read_snapshots(file, header);
  const auto it = find(all, name);
  if (it == all.end()) throw Error(ENOENT, "Can't find snapshot");
  Header out = header;
  const Geometry g = header.geometry();
  out.l1_offset = it->l1_offset;
  out.l1_size = it->l1_size;
  if (it->disk_size != 0) out.size = it->disk_size;
  const uint64_t bytes = uint64_t{out.l1_size} * 8;
  if (bytes > kMaxL1Bytes || g.offset_in_cluster(out.l1_offset) != 0 ||
      !base::range_fits(out.l1_offset, bytes, file.size())) {
    throw Error(EINVAL, fmt::format("the L1 table of snapshot '{}' is too long, misaligned or past "
                                    "the end of the file",
                                    it->name));
  }
  const uint64_t covered =
      g.l1_shift() >= 63 ? ~uint64_t{0} : uint64_t{out.l1_size} << g.l1_shift();
  if (out.size > kMaxDiskSize || covered < out.size) {
    throw Error(EINVAL, fmt::format("the L1 table of snapshot '{}' is too small for a disk of {} "
                                    "bytes",
                                    it->name, out.size));
  }
  out.bitmaps.reset();
  out.autoclear &= ~kAutoclearBitmaps;
  return out;
}

}  // namespace minivmm::block::qcow2
