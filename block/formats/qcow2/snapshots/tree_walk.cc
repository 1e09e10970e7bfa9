// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/snapshots/tree_walk.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"
#include "base/checked.h"
#include "base/event_loop.h"

namespace minivmm::block::qcow2 {
namespace {

base::Error invalid(const ImageFile& image, const std::string& what) {
  return {EINVAL, fmt::format("{}: {}; `minivmm image check -r all` may help", image.name(), what)};
}

void check_tables(const ImageFile& image, const L1Entries& l1) {
  const Geometry& g = image.geometry();
  std::vector<uint64_t> tables;
  for (size_t i = 0; i < l1.size(); ++i) {
    if (l1[i] == 0) continue;
    const uint64_t table = l1[i] & kOffsetMask;
    const char* problem = l1_problem(l1[i], g);
    if (problem == nullptr && !base::range_fits(table, g.cluster_size(), image.size())) {
      problem = "it points past the end of the file";
    }
    if (problem != nullptr) {
      throw invalid(image, fmt::format("L1 entry {} ({:#x}) is invalid: {}", i, l1[i], problem));
    }
    tables.push_back(table);
  }
  std::sort(tables.begin(), tables.end());
  const auto twice = std::adjacent_find(tables.begin(), tables.end());
  if (twice != tables.end()) {
    throw invalid(image, fmt::format("the L2 table at {:#x} is used twice", *twice));
  }
}

}  // namespace

L1Entries read_l1(ImageFile& image, uint64_t offset, uint64_t entries) {
  const uint64_t bytes = entries * 8;
  if (entries == 0) return {};
  if (bytes > kMaxL1Bytes || offset == 0 || image.geometry().offset_in_cluster(offset) != 0 ||
      !base::range_fits(offset, bytes, image.size())) {
    throw invalid(image, fmt::format("the L1 table at {:#x} with {} entries is too long, "
                                     "misaligned or past the end of the file",
                                     offset, entries));
  }
  base::Buffer buffer(bytes);
  image.file().read(offset, buffer.io());
  L1Entries out(entries);
  for (size_t i = 0; i < out.size(); ++i) out[i] = base::load_be<uint64_t>(buffer.data() + i * 8);
  return out;
}

void walk_tree(ImageFile& image, const L1Entries& l1, const VisitReference& visit) {
  const Geometry& g = image.geometry();
  check_tables(image, l1);
  base::Buffer bytes(g.cluster_size());
  unsigned tables = 0;
  for (uint64_t index = 0; index < l1.size(); ++index) {
    if (l1[index] == 0) continue;
    if (++tables % 64 == 0) base::EventLoop::current()->yield();
    const uint64_t table = l1[index] & kOffsetMask;
    visit({table >> g.cluster_bits, 1}, true);
    image.file().read(table, bytes.io());
    uint64_t guest_offset = index << g.l1_shift();
    for (uint64_t i = 0; i < g.l2_entries(); ++i, guest_offset += g.cluster_size()) {
      const RawL2 raw = load_l2(bytes.data() + i * g.l2_entry_bytes(), g);
      const L2Entry entry = decode_l2(raw, g, guest_offset);
      const HostClusters clusters = qcow2::clusters_of(entry, g);
      const char* problem = entry.problem;
      // Room that is only reserved may lie past the end.
      const bool stored = clusters.count != 0 && (entry.compressed || entry.data != 0);
      if (stored && clusters.first << g.cluster_bits >= image.size()) {
        problem = "it points past the end of the file";
      }
      if (problem != nullptr) {
        throw invalid(image, fmt::format("L2 entry {:#x} at {:#x} is invalid: {}", raw.entry,
                                         table + i * g.l2_entry_bytes(), problem));
      }
      if (clusters.count != 0) visit(clusters, false);
    }
  }
}

}  // namespace minivmm::block::qcow2
