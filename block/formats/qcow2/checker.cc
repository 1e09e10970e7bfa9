// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/checker.h"

#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/checked.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/tables.h"

namespace minivmm::block::qcow2 {

namespace {

constexpr uint64_t kMostLines = 5000;

}  // namespace

CheckResult check_image(Edge& file, const CheckReport& report) {
  const Header header = read_header(file);
  require_supported(header);
  return Checker(file, header, report).run();
}

Checker::Checker(Edge& file, const Header& header, const CheckReport& report)
    : file_(file),
      header_(header),
      report_(report),
      geometry_(header.geometry()),
      file_size_(file.size()) {}

void Checker::count_references() {
  result_.total_clusters = geometry_.clusters(header_.size);
  count_range(0, geometry_.cluster_size());
  if (header_.luks) count_range(header_.luks->offset, header_.luks->length);
  count_l1(header_.l1_offset, header_.l1_size, Active::kYes);
  count_snapshots();
  count_l2_tables();
  lost_references_ = result_.corruptions != 0;
  count_bitmaps();
  unreadable_tables_ = result_.check_errors != 0;
}

CheckResult Checker::run() {
  count_references();
  count_refcount_table();
  compare();
  only_flags_wrong_ = result_.corruptions == 0 && result_.check_errors == 0;
  check_copied();
  return result_;
}

void Checker::say(const std::string& line) {
  ++lines_;
  if (lines_ <= kMostLines) report_(line);
  if (lines_ == kMostLines) report_("(further findings are counted and not listed)");
}

bool Checker::read(uint64_t offset, base::Buffer& to, const char* what) {
  try {
    file_.read(offset, to.io());
    return true;
  } catch (const base::Error& e) {
    ++result_.check_errors;
    say(fmt::format("ERROR: cannot read the {} at {:#x}: {}", what, offset, e.what()));
    return false;
  }
}

Checker::Table Checker::read_table(uint64_t offset, uint64_t entries, const char* what) {
  base::Buffer bytes(entries * 8);
  if (!read(offset, bytes, what)) return {};
  Table out(entries);
  for (uint64_t i = 0; i < entries; ++i) {
    out[i] = base::load_be<uint64_t>(bytes.data() + i * 8);
  }
  return out;
}

bool Checker::count_range(uint64_t offset, uint64_t bytes, uint64_t times, bool* shared) {
  if (bytes == 0) return true;
  // As QEMU has it: the last cluster of a file may be cut short.
  if (offset > file_size_ || offset + bytes > file_size_ + geometry_.cluster_size()) {
    corruption(
        "counting reference for region exceeding the end of the file by one cluster or "
        "more: offset {:#x} size {:#x}",
        offset, bytes);
    return false;
  }
  const uint64_t last = (offset + bytes - 1) >> geometry_.cluster_bits;
  for (uint64_t cluster = offset >> geometry_.cluster_bits; cluster <= last; ++cluster) {
    const uint64_t before = counts_.add(cluster, times);
    if (before != 0 && shared != nullptr) *shared = true;
  }
  return true;
}

void Checker::count_l1(uint64_t offset, uint64_t entries, Active active) {
  if (entries == 0) return;
  bool shared = false;
  if (!count_range(offset, entries * 8, 1, &shared)) return;
  // No two L1 tables are the same: to follow it again would only take time.
  if (shared) {
    corruption("L1 table at {:#x} overlaps other metadata", offset);
    return;
  }
  Table table = read_table(offset, entries, "L1 table");
  std::vector<std::pair<uint64_t, size_t>> found;  // L2 table, index
  for (size_t i = 0; i < table.size(); ++i) {
    uint64_t& raw = table[i];
    if (raw == 0) continue;
    if (const char* problem = l1_problem(raw, geometry_)) {
      corruption("L1 entry {} ({:#x}) is invalid: {}", i, raw, problem);
      raw = 0;
    } else if (!count_range(raw & kOffsetMask, geometry_.cluster_size())) {
      raw = 0;
    } else {
      found.emplace_back(raw & kOffsetMask, i);
    }
  }
  std::sort(found.begin(), found.end());
  for (size_t i = 0; i < found.size(); ++i) {
    const auto [l2, index] = found[i];
    if (i != 0 && l2 == found[i - 1].first) {
      corruption("L1 entry {} ({:#x}) refers to the L2 table of another entry", index,
                 table[index]);
      table[index] = 0;
    } else {
      l2_uses_.push_back({l2, 1, index, active == Active::kYes});
    }
  }
  if (l2_uses_.size() > join_at_) join_uses();
  if (active == Active::kYes) l1_ = std::move(table);
}

// One entry for each table. Snapshots share most of theirs, so this keeps the list short.
void Checker::join_uses() {
  std::sort(l2_uses_.begin(), l2_uses_.end(),
            [](const L2Use& a, const L2Use& b) { return a.offset < b.offset; });
  size_t kept = 0;
  for (size_t i = 0; i < l2_uses_.size(); ++i) {
    const L2Use use = l2_uses_[i];
    if (kept == 0 || l2_uses_[kept - 1].offset != use.offset) {
      l2_uses_[kept++] = use;
      continue;
    }
    L2Use& known = l2_uses_[kept - 1];
    known.times += use.times;
    if (use.active) known.l1_index = use.l1_index;
    known.active = known.active || use.active;
  }
  l2_uses_.resize(kept);
  join_at_ = std::max(join_at_, 2 * kept);
}

// Each table is read once, however many snapshots use it.
void Checker::count_l2_tables() {
  join_uses();
  for (const L2Use& use : l2_uses_) count_l2(use);
}

void Checker::count_l2(const L2Use& use) {
  next_fragment_ = 0;  // each table by itself, as in qemu-img's numbers
  uint64_t guest_offset = use.l1_index << geometry_.l1_shift();
  each_l2_entry(use.offset, [&](RawL2 raw) {
    if (is_plain(raw)) {
      const uint64_t host_offset = raw.entry & kOffsetMask;
      counts_.add(host_offset >> geometry_.cluster_bits, use.times);
      if (use.active) follow_fragments(host_offset);
    } else if (raw != RawL2{}) {
      count_entry(raw, guest_offset, use);
    }
    guest_offset += geometry_.cluster_size();
  });
}

void Checker::follow_fragments(uint64_t offset) {
  ++result_.allocated_clusters;
  if (next_fragment_ != 0 && offset != next_fragment_) ++result_.fragmented_clusters;
  next_fragment_ = offset + geometry_.cluster_size();
}

void Checker::count_entry(RawL2 raw, uint64_t guest_offset, const L2Use& use) {
  const L2Entry entry = decode_l2(raw, geometry_, guest_offset);
  if (entry.problem != nullptr) {
    corruption("L2 entry {:#x} (bitmap {:#x}) is invalid: {}", raw.entry, raw.bitmap,
               entry.problem);
    return;
  }
  if (entry.has_host) {
    // What lies in an external data file is not counted.
    const bool sound = geometry_.external_data ||
                       count_range(entry.host_offset, geometry_.cluster_size(), use.times);
    if (sound && use.active) follow_fragments(entry.host_offset);
    return;
  }
  if (!entry.compressed) return;
  if (raw.bitmap != 0) {
    corruption("compressed cluster at {:#x} has a subcluster bitmap ({:#x})", entry.host_offset,
               raw.bitmap);
  }
  if (count_range(entry.host_offset, entry.compressed_bytes, use.times) && use.active) {
    // Compressed clusters are fragmented by nature.
    ++result_.allocated_clusters;
    ++result_.compressed_clusters;
    ++result_.fragmented_clusters;
  }
}

void Checker::count_snapshots() {
  uint64_t offset = header_.snapshots_offset;
  for (uint32_t i = 0; i < header_.snapshots; ++i) {
    if (!count_snapshot(offset)) return;
  }
  if (header_.snapshots != 0) {
    count_range(header_.snapshots_offset, offset - header_.snapshots_offset);
  }
}

// Advances `offset` past the entry. False: the table cannot be followed further.
bool Checker::count_snapshot(uint64_t& offset) {
  base::Buffer fixed(kSnapshotFixedBytes);
  if (!base::range_fits(offset, fixed.size(), file_size_)) {
    corruption("snapshot table entry at {:#x} lies past the end of the file", offset);
    return false;
  }
  if (!read(offset, fixed, "snapshot table")) return false;
  const SnapshotEntry entry = decode_snapshot_sizes(fixed.span());
  if (entry.extra_bytes > kMaxSnapshotExtraBytes ||
      !base::range_fits(offset, entry.total_bytes(), file_size_ + geometry_.cluster_size())) {
    corruption("snapshot table entry at {:#x} is too long", offset);
    return false;
  }
  offset += entry.total_bytes();
  if (uint64_t{entry.l1_size} * 8 > kMaxL1Bytes ||
      geometry_.offset_in_cluster(entry.l1_offset) != 0 || entry.l1_offset >= kMaxHostOffset) {
    corruption("snapshot L1 table at {:#x} with {} entries: invalid", entry.l1_offset,
               entry.l1_size);
    return true;
  }
  count_l1(entry.l1_offset, entry.l1_size, Active::kNo);
  return true;
}

void Checker::count_bitmaps() {
  // Without the autoclear bit the bitmaps are out of date, and their clusters are leaks.
  if (!header_.bitmaps || (header_.autoclear & kAutoclearBitmaps) == 0) return;
  const uint64_t before = result_.corruptions;
  count_bitmap_directory(*header_.bitmaps);
  bad_bitmaps_ = result_.corruptions != before;
}

void Checker::count_bitmap_directory(const BitmapsExtension& e) {
  if (!count_range(e.directory_offset, e.directory_size)) return;
  const uint64_t end = e.directory_offset + e.directory_size;
  uint64_t offset = e.directory_offset;
  base::Buffer fixed(kBitmapFixedBytes);
  for (uint32_t i = 0; i < e.count; ++i) {
    if (!base::range_fits(offset, fixed.size(), end)) {
      corruption("bitmap directory entry {} lies past the directory's end", i);
      return;
    }
    if (!read(offset, fixed, "bitmap directory")) return;
    const BitmapEntry entry = decode_bitmap(fixed.span());
    if (entry.name_bytes > kMaxBitmapNameBytes ||
        !base::range_fits(offset, entry.total_bytes(), end)) {
      corruption("bitmap directory entry {} is too long", i);
      return;
    }
    offset += entry.total_bytes();
    count_bitmap(entry.table_offset, entry.table_size);
  }
}

void Checker::count_bitmap(uint64_t table_offset, uint64_t entries) {
  const uint64_t bytes = entries * 8;
  if (geometry_.offset_in_cluster(table_offset) != 0 ||
      !base::range_fits(table_offset, bytes, file_size_)) {
    corruption("bitmap table at {:#x} with {} entries: misaligned or past the end of the file",
               table_offset, entries);
    return;
  }
  bool shared = false;
  count_range(table_offset, bytes, 1, &shared);
  if (shared) {
    corruption("bitmap table at {:#x} overlaps other metadata", table_offset);
    return;
  }
  constexpr uint64_t kPiece = 1 << 16;
  for (uint64_t done = 0; done < entries; done += kPiece) {
    for (const uint64_t raw :
         read_table(table_offset + done * 8, std::min(kPiece, entries - done), "bitmap table")) {
      const uint64_t cluster = raw & kOffsetMask;
      if ((raw & ~(kOffsetMask | 1)) != 0 || (cluster != 0 && (raw & 1) != 0) ||
          geometry_.offset_in_cluster(cluster) != 0) {
        corruption("bitmap table entry {:#x} is invalid", raw);
      } else if (cluster != 0) {
        count_range(cluster, geometry_.cluster_size());
      }
    }
  }
}

void Checker::count_refcount_table() {
  const uint64_t before = result_.corruptions;
  count_range(header_.refcount_table_offset, header_.refcount_table_bytes(), 1, &needs_rebuild_);
  refcount_table_ = read_table(header_.refcount_table_offset, header_.refcount_table_bytes() / 8,
                               "refcount table");
  for (size_t i = 0; i < refcount_table_.size(); ++i) {
    uint64_t& raw = refcount_table_[i];
    if (raw == 0) continue;
    const uint64_t cluster = raw >> geometry_.cluster_bits;
    if (const char* problem = refcount_table_problem(raw, geometry_)) {
      corruption("refcount block {} is invalid: {}", i, problem);
      raw = 0;
    } else if (raw >= file_size_) {
      corruption("refcount block {} is outside image", i);
      raw = 0;
    } else if (counts_.add(cluster) != 0) {
      corruption("refcount block {} refcount={}", i, counts_.get(cluster));
      raw = 0;
    }
  }
  if (result_.corruptions != before) needs_rebuild_ = true;
}

}  // namespace minivmm::block::qcow2
