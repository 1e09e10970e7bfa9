// SPDX-License-Identifier: Apache-2.0
// Refcounts: put right in their blocks, or made anew.
#include <algorithm>
#include <array>
#include <cerrno>

#include "base/bytes.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/refcount_codec.h"
#include "block/formats/qcow2/repairer.h"

namespace minivmm::block::qcow2 {
namespace {

// The indexes of the blocks that describe [first, first + count).
void add_blocks(std::vector<uint64_t>& indexes, const Geometry& g, uint64_t first, uint64_t count) {
  for (uint64_t i = first >> g.block_bits(); i <= (first + count - 1) >> g.block_bits(); ++i) {
    indexes.push_back(i);
  }
  std::sort(indexes.begin(), indexes.end());
  indexes.erase(std::unique(indexes.begin(), indexes.end()), indexes.end());
}

// A refcount structure behind everything else: blocks, then the table.
struct Structure {
  uint64_t first = 0;             // cluster
  std::vector<uint64_t> indexes;  // of the blocks, ascending
  uint64_t table_clusters = 0;
  uint64_t table() const noexcept { return first + indexes.size(); }
  uint64_t end() const noexcept { return table() + table_clusters; }
};

Structure plan_structure(const ClusterCounts& counts, const Geometry& g, uint64_t file_size) {
  Structure out;
  out.first = g.clusters(file_size);
  std::vector<uint64_t> used;
  for (const uint64_t chunk : counts.chunks()) {
    for (uint64_t cluster = chunk; cluster < chunk + ClusterCounts::kChunk; ++cluster) {
      if (counts.get(cluster) == 0) continue;
      out.first = std::max(out.first, cluster + 1);
      const uint64_t index = cluster >> g.block_bits();
      if (used.empty() || used.back() != index) used.push_back(index);
    }
  }
  out.indexes = used;
  // The structure describes itself, which may take more of it; this settles after a few rounds.
  for (uint64_t before = 0; before != out.end();) {
    before = out.end();
    out.indexes = used;
    add_blocks(out.indexes, g, out.first, before - out.first);
    out.table_clusters = g.clusters((out.indexes.back() + 1) * 8);
  }
  return out;
}

}  // namespace

bool Repairer::set_refcounts(const Checker& found, Direction direction) {
  bool changed = false;
  const Table& table = found.refcount_table();
  for (uint64_t index = 0; index < table.size(); ++index) {
    if (table[index] == 0) continue;
    if (set_block(found, index, table[index], direction)) changed = true;
  }
  return changed;
}

bool Repairer::set_block(const Checker& found, uint64_t index, uint64_t offset,
                         Direction direction) {
  const unsigned order = geometry_.refcount_order;
  base::Buffer& block = read_cluster(offset);
  const uint64_t first = index << geometry_.block_bits();
  bool changed = false;
  for (uint64_t i = 0; i < geometry_.block_entries(); ++i) {
    const uint64_t now = get_refcount(block.data(), i, order);
    // A count that does not fit: the most that does, which is never lowered by mistake.
    const uint64_t right = std::min(found.counts().get(first + i), geometry_.refcount_max());
    if (direction == Direction::kUp ? right <= now : right >= now) continue;
    set_refcount(block.data(), i, order, right);
    changed = true;
    // What a check does not count is not reported either.
    if (first + i >= found.compared_clusters()) continue;
    say(fmt::format("Repairing cluster {} refcount={} reference={}", first + i, now, right));
    ++(direction == Direction::kUp ? corruptions_fixed_ : leaks_fixed_);
  }
  if (!changed) return false;
  clear_autoclear();
  write_changed(offset, block, 0, block.size());
  return true;
}

void change_refcount_width(Edge& file, unsigned order) {
  Header header = read_header(file);
  require_supported(header);
  Repairer(file, std::move(header), [](const std::string&) {}).change_width(order);
}

void Repairer::change_width(unsigned order) {
  Checker found(file_, header_, silent_);
  const CheckResult result = found.run();
  if (result.corruptions != 0 || result.check_errors != 0) {
    throw base::Error(EINVAL,
                      "the image is corrupt: repair it before its refcounts are rewritten (`check "
                      "-r all`)");
  }
  const uint64_t most = Geometry{.refcount_order = order}.refcount_max();
  for (const uint64_t chunk : found.counts().chunks()) {
    for (uint64_t cluster = chunk; cluster < chunk + ClusterCounts::kChunk; ++cluster) {
      if (found.counts().get(cluster) <= most) continue;
      throw base::Error(
          EINVAL, fmt::format("Cannot decrease refcount entry width to {} bits: Cluster at offset "
                              "{:#x} has a refcount of {}",
                              uint64_t{1} << order, cluster << geometry_.cluster_bits,
                              found.counts().get(cluster)));
    }
  }
  clear_autoclear();
  rebuild_refcounts(order);
}

void Repairer::rebuild_refcounts(unsigned order) {
  say("Rebuilding refcount structure");
  Checker now(file_, header_, silent_);
  now.count_references();
  const ClusterCounts& counts = now.counts();
  Geometry g = geometry_;
  g.refcount_order = order;
  const Structure plan = plan_structure(counts, g, file_.size());
  if (plan.table_clusters << g.cluster_bits > kMaxRefcountTableBytes ||
      plan.end() >= kMaxHostOffset >> g.cluster_bits) {
    throw base::Error(EFBIG, "the refcounts of the image do not fit a refcount table of 8 MiB");
  }
  base::Buffer table = base::Buffer::zeroed(plan.table_clusters << g.cluster_bits);
  for (size_t b = 0; b < plan.indexes.size(); ++b) {
    const uint64_t first = plan.indexes[b] << g.block_bits();
    std::fill_n(cluster_.data(), cluster_.size(), std::byte{0});
    for (uint64_t i = 0; i < g.block_entries(); ++i) {
      const uint64_t cluster = first + i;
      const bool own = cluster >= plan.first && cluster < plan.end();
      const uint64_t count = own ? 1 : std::min(counts.get(cluster), g.refcount_max());
      if (count != 0) set_refcount(cluster_.data(), i, g.refcount_order, count);
    }
    const uint64_t offset = (plan.first + b) << g.cluster_bits;
    file_.write(offset, cluster_.io());
    base::store_be(table.data() + plan.indexes[b] * 8, offset);
  }
  const uint64_t table_offset = plan.table() << g.cluster_bits;
  file_.write(table_offset, table.io());
  file_.flush();
  header_.refcount_table_offset = table_offset;
  header_.refcount_table_clusters = static_cast<uint32_t>(plan.table_clusters);
  header_.refcount_order = order;
  // The fields lie in one sector: a crash leaves the old table or the new one.
  const std::vector<std::byte> fields = serialise_fields(header_);
  const uint64_t end = header_.version >= 3 ? kRefcountOrderField + 4 : kRefcountTableField + 12;
  file_.write(kRefcountTableField, base::SingleBuffer(std::span(fields).subspan(
                                       kRefcountTableField, end - kRefcountTableField)));
  file_.flush();
}

}  // namespace minivmm::block::qcow2
