// SPDX-License-Identifier: Apache-2.0
// Image::grow_l1: the L1 table becomes larger, mostly at another place.
//
// The order: the new clusters are counted, durably; the table is written to them as the file has
// it, durably; the header, in one write, points to it; from then on commits go there. A crash
// leaves one of the two tables in use and the other's clusters leaked. The old clusters go through
// the quarantine, and the old array in memory lives until nobody can look at it any more.
#include <cerrno>
#include <exception>
#include <memory>

#include <fmt/core.h>

#include "block/formats/qcow2/image.h"

namespace minivmm::block::qcow2 {

void Image::grow_l1(uint64_t entries, base::Epoch& epoch) {
  const Geometry& g = file_.geometry();
  const uint64_t old_size = l1_.size();
  if (entries <= old_size) return;
  if (entries > kMaxL1Bytes / 8) {
    throw base::Error(
        EFBIG, fmt::format("{}: with clusters of {} bytes the disk can have at most "
                           "{} bytes",
                           file_.name(), g.cluster_size(), (kMaxL1Bytes / 8) << g.l1_shift()));
  }
  const auto size = static_cast<uint32_t>(entries);
  auto array = std::make_unique<std::atomic<uint64_t>[]>(size);
  const uint64_t old_offset = l1_.offset();
  const HostClusters old{old_offset >> g.cluster_bits, g.clusters(old_size * 8)};
  const uint64_t clusters = g.clusters(entries * 8);
  const bool moves = clusters != old.count;
  const uint64_t offset = moves ? allocator_.allocate_together(clusters) : old_offset;
  std::exception_ptr error;
  try {
    committer_.commit();
    committer_.without_commit([&] { switch_l1(offset, size, array); });
  } catch (...) {
    error = std::current_exception();
  }
  if (error) {
    // Once writes are refused, nobody knows which of the two the header points to.
    if (moves && !file_.broken()) allocator_.give_back(offset, clusters);
    std::rethrow_exception(error);
  }
  epoch.synchronize();
  array.reset();
  if (moves && old.count != 0) quarantine_.add(old);
}

// Commits wait. `array` becomes the one that was in use.
void Image::switch_l1(uint64_t offset, uint32_t entries, L1Table::Entries& array) {
  const Geometry& g = file_.geometry();
  l1_.write_copy(offset, entries);
  file_.file().flush();
  file_.change_numbers([&](Header& h) {
    h.l1_offset = offset;
    h.l1_size = entries;
  });
  array = l1_.move(offset, std::move(array), entries);
  metadata_.move_l1_table(offset >> g.cluster_bits, g.clusters(uint64_t{entries} * 8));
}

}  // namespace minivmm::block::qcow2
