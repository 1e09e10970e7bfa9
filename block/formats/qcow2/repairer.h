// SPDX-License-Identifier: Apache-2.0
// The work behind repair_image: the order of steps (repair.cc), entries of L1 and L2 tables
// (repair_tables.cc), refcounts (repair_refcounts.cc). One object a repair; used by one fiber.
//
// Memory: a check's, and one table.
#pragma once

#include <string>

#include <cstdint>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "block/formats/qcow2/checker.h"
#include "block/formats/qcow2/repair.h"

namespace minivmm::block::qcow2 {

class Repairer {
 public:
  Repairer(Edge& file, Header header, const CheckReport& report);
  RepairResult run(Repair what);
  // See change_refcount_width.
  void change_width(unsigned order);

 private:
  using Table = Checker::Table;
  using Words = std::vector<std::pair<uint64_t, uint64_t>>;  // offset in the file, value

  // repair.cc
  bool mend_all(const Checker& found);
  void count_fixed(RepairResult& out) const;
  void drop_bitmaps();
  void clear_autoclear();
  void set_field(uint64_t offset, uint64_t value);
  void mark_dirty();
  void mark_clean();

  // repair_tables.cc
  bool mend_tables();
  bool mend_snapshots(const Checker& found);
  bool mend_l1(const Checker& found, uint64_t offset, uint64_t entries);
  Table mended_l1(const Checker& found, const Table& old);
  uint64_t mended_l1_entry(const Checker& found, uint64_t raw, uint64_t l1_index);
  bool is_garbage(const Checker& found, uint64_t table, uint64_t l1_index);
  bool mend_l2_tables(const Checker& found);
  bool mend_l2_table(const Checker& found, const Checker::L2Use& use);
  RawL2 mended_l2_entry(const Checker& found, RawL2 raw, uint64_t guest_offset) const;
  bool mend_copied();
  bool mend_copied_l2(const ClusterCounts& counts, uint64_t table);
  bool is_metadata(const Checker& found, uint64_t first, uint64_t count) const;
  bool is_fixed(uint64_t cluster) const noexcept;
  bool in_file(uint64_t offset, uint64_t bytes) const;

  // repair_refcounts.cc
  enum class Direction { kUp, kDown };
  bool set_refcounts(const Checker& found, Direction direction);
  bool set_block(const Checker& found, uint64_t index, uint64_t offset, Direction direction);
  // In entries of that width; the header says so in the same write.
  void rebuild_refcounts(unsigned order);

  Table read_table(uint64_t offset, uint64_t entries);
  base::Buffer& read_cluster(uint64_t offset);
  void write_words(const Words& words);
  void write_changed(uint64_t offset, const base::Buffer& bytes, size_t begin, size_t end);
  void say(const std::string& line);

  Edge& file_;
  Header header_;
  const CheckReport& report_;
  const Geometry geometry_;
  const CheckReport silent_;
  base::Buffer cluster_;
  uint64_t leaks_fixed_ = 0;
  uint64_t corruptions_fixed_ = 0;
  bool rebuilt_ = false;
  uint64_t lines_ = 0;
};

}  // namespace minivmm::block::qcow2
