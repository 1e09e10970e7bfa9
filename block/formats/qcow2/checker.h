// SPDX-License-Identifier: Apache-2.0
// The work behind check_image: counts references (checker.cc), then compares (checker_compare.cc).
// One object a check; used by one fiber.
#pragma once

#include <string>

#include <cstdint>
#include <unordered_map>
#include <vector>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/error.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/cluster_counts.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/l2_entry.h"

namespace minivmm::block::qcow2 {

class Checker {
 public:
  Checker(Edge& file, const Header& header, const CheckReport& report);
  CheckResult run();
  // Only the first half: what is referred to, but for the refcounts themselves.
  void count_references();

  // --- What a repair wants to know afterwards ---
  using Table = std::vector<uint64_t>;  // host order
  // Which L1 tables use an L2 table, and where the active one has it.
  struct L2Use {
    uint64_t offset = 0;
    uint64_t times = 1;
    uint64_t l1_index = 0;
    bool active = false;
  };
  const CheckResult& result() const noexcept { return result_; }
  const ClusterCounts& counts() const noexcept { return counts_; }
  // Those whose refcounts are compared: refcounts of what lies past the end of the file harm
  // nobody, unless it is used.
  uint64_t compared_clusters() const;
  // Sorted by offset, one for each table.
  const std::vector<L2Use>& l2_uses() const noexcept { return l2_uses_; }
  // Host order; what is no block is 0.
  const Table& refcount_table() const noexcept { return refcount_table_; }
  // References that make no sense: what they once meant is not known to be unused.
  bool lost_references() const noexcept { return lost_references_; }
  // Tables that cannot be read.
  bool unreadable_tables() const noexcept { return unreadable_tables_; }
  bool bad_bitmaps() const noexcept { return bad_bitmaps_; }
  // Nothing is wrong but for leaks and flags.
  bool only_flags_wrong() const noexcept { return only_flags_wrong_; }
  // Refcounts cannot be put right where they are.
  bool needs_rebuild() const noexcept { return needs_rebuild_; }

 private:
  enum class Active { kYes, kNo };

  // checker.cc
  void count_l1(uint64_t offset, uint64_t entries, Active active);
  void join_uses();
  void count_l2_tables();
  void count_l2(const L2Use& use);
  void count_entry(RawL2 raw, uint64_t guest_offset, const L2Use& use);
  void count_snapshots();
  bool count_snapshot(uint64_t& offset);
  void count_bitmaps();
  void count_bitmap_directory(const BitmapsExtension& e);
  void count_bitmap(uint64_t table_offset, uint64_t entries);
  void count_refcount_table();
  void follow_fragments(uint64_t offset);

  // checker_compare.cc
  void compare();
  void compare_block(uint64_t index);
  void compare_unblocked();
  void compare_cluster(uint64_t cluster, uint64_t refcount);
  void check_copied();
  void check_copied_l2(uint64_t l1_index, uint64_t l1_entry);
  void check_copied_entry(RawL2 raw, uint64_t guest_offset);
  uint64_t refcount_on_disk(uint64_t cluster) const;

  // Counts the clusters of a range as used so many times; false: it lies past the end of the file
  // (a corruption). `shared`: receives whether any of it had been counted before.
  bool count_range(uint64_t offset, uint64_t bytes, uint64_t times = 1, bool* shared = nullptr);
  // A table of big-endian numbers; empty (and a check error) if it cannot be read.
  Table read_table(uint64_t offset, uint64_t entries, const char* what);
  // Calls use(RawL2) for each entry of the L2 table there; for none if it cannot be read.
  template <typename Use>
  void each_l2_entry(uint64_t offset, Use&& use) {
    if (l2_table_.size() == 0) l2_table_ = base::Buffer(geometry_.cluster_size());
    if (!read(offset, l2_table_, "L2 table")) return;
    const std::byte* at = l2_table_.data();
    const std::byte* const end = at + l2_table_.size();
    for (; at < end; at += geometry_.l2_entry_bytes()) use(load_l2(at, geometry_));
  }
  // An entry that only names a cluster of the image, as nearly all do; those are not decoded.
  bool is_plain(RawL2 raw) const noexcept {
    const uint64_t offset = raw.entry & ~kFlagCopied;
    return !geometry_.extended_l2 && !geometry_.external_data && offset != 0 &&
           (offset & ~kOffsetMask) == 0 && geometry_.offset_in_cluster(offset) == 0 &&
           offset + geometry_.cluster_size() <= file_size_;
  }
  bool read(uint64_t offset, base::Buffer& to, const char* what);

  template <typename... Args>
  void corruption(fmt::format_string<Args...> format, Args&&... args) {
    ++result_.corruptions;
    say("ERROR " + fmt::format(format, std::forward<Args>(args)...));
  }
  void say(const std::string& line);

  Edge& file_;
  const Header& header_;
  const CheckReport& report_;
  const Geometry geometry_;
  const uint64_t file_size_;
  CheckResult result_;
  ClusterCounts counts_;
  std::vector<L2Use> l2_uses_;  // more than one for a table until they are joined
  size_t join_at_ = 1 << 16;
  Table l1_;
  Table refcount_table_;
  base::Buffer block_;
  base::Buffer l2_table_;
  std::unordered_map<uint64_t, uint64_t> wrong_;  // refcounts of used clusters that are wrong
  uint64_t next_fragment_ = 0;
  uint64_t lines_ = 0;
  bool lost_references_ = false;
  bool unreadable_tables_ = false;
  bool bad_bitmaps_ = false;
  bool needs_rebuild_ = false;
  bool only_flags_wrong_ = false;
};

}  // namespace minivmm::block::qcow2
