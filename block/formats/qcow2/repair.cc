// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/repair.h"

#include <array>

#include "base/bytes.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/repairer.h"

namespace minivmm::block::qcow2 {

namespace {

constexpr uint64_t kMostLines = 5000;

}  // namespace

RepairResult repair_image(Edge& file, Repair what, const CheckReport& report) {
  Header header = read_header(file);
  require_supported(header);
  return Repairer(file, std::move(header), report).run(what);
}

Repairer::Repairer(Edge& file, Header header, const CheckReport& report)
    : file_(file),
      header_(std::move(header)),
      report_(report),
      geometry_(header_.geometry()),
      silent_([](const std::string&) {}),
      cluster_(geometry_.cluster_size()) {}

RepairResult Repairer::run(Repair what) {
  RepairResult out;
  bool changed = false;
  {
    Checker found(file_, header_, report_);
    out.found = out.left = found.run();
    // What cannot be read may refer to anything.
    if (found.unreadable_tables()) return out;
    if (what == Repair::kAll) {
      changed = mend_all(found);
    } else if (!found.lost_references()) {
      changed = set_refcounts(found, Direction::kDown);
      // As qemu-img does. Once the refcounts are right it is safe.
      if (found.only_flags_wrong() && mend_copied()) changed = true;
    }
  }
  if (changed) {
    file_.flush();
    out.left = Checker(file_, header_, report_).run();
    count_fixed(out);
  }
  if (out.left.corruptions == 0 && out.left.check_errors == 0) mark_clean();
  return out;
}

void Repairer::count_fixed(RepairResult& out) const {
  const auto less = [](uint64_t before, uint64_t now) { return before > now ? before - now : 0; };
  out.leaks_fixed = rebuilt_ ? less(out.found.leaks, out.left.leaks) : leaks_fixed_;
  out.corruptions_fixed =
      rebuilt_ ? less(out.found.corruptions, out.left.corruptions) : corruptions_fixed_;
}

bool Repairer::mend_all(const Checker& found) {
  if (found.result().corruptions != 0 || found.needs_rebuild()) mark_dirty();
  bool changed = found.bad_bitmaps();
  if (found.bad_bitmaps()) drop_bitmaps();
  if (mend_tables()) changed = true;
  Checker mended(file_, header_, silent_);
  mended.run();
  rebuilt_ = mended.needs_rebuild();
  if (rebuilt_) {
    rebuild_refcounts(geometry_.refcount_order);
    changed = true;
  } else if (set_refcounts(mended, Direction::kUp)) {
    file_.flush();
    changed = true;
  }
  if (mend_copied()) {
    file_.flush();
    changed = true;
  }
  const bool may_lower = !rebuilt_ && !mended.lost_references();
  if (may_lower && set_refcounts(mended, Direction::kDown)) changed = true;
  return changed;
}

// Their clusters are found to be leaks afterwards.
void Repairer::drop_bitmaps() {
  say("Repairing bitmaps: their directory makes no sense and is dropped");
  header_.autoclear &= ~kAutoclearBitmaps;
  header_.bitmaps.reset();
  set_field(kAutoclearField, header_.autoclear);
  file_.flush();
  ++corruptions_fixed_;
}

void Repairer::say(const std::string& line) {
  if (++lines_ <= kMostLines) report_(line);
}

// As before any change: bits that vouch for what a repair does not know.
void Repairer::clear_autoclear() {
  const uint64_t kept = header_.autoclear & (kAutoclearBitmaps | kAutoclearRawData);
  if (kept == header_.autoclear) return;
  header_.autoclear = kept;
  set_field(kAutoclearField, kept);
  file_.flush();
}

void Repairer::set_field(uint64_t offset, uint64_t value) {
  std::array<std::byte, 8> bytes;
  base::store_be(bytes.data(), value);
  file_.write(offset, base::SingleBuffer(std::span<const std::byte>(bytes)));
}

void Repairer::mark_dirty() {
  clear_autoclear();
  if (header_.version < 3 || (header_.incompatible & kIncompatDirty) != 0) return;
  header_.incompatible |= kIncompatDirty;
  set_field(kIncompatibleField, header_.incompatible);
  file_.flush();
}

void Repairer::mark_clean() {
  const uint64_t marks = kIncompatDirty | kIncompatCorrupt;
  if (header_.version < 3 || (header_.incompatible & marks) == 0) return;
  file_.flush();
  header_.incompatible &= ~marks;
  set_field(kIncompatibleField, header_.incompatible);
  file_.flush();
}

Repairer::Table Repairer::read_table(uint64_t offset, uint64_t entries) {
  base::Buffer bytes(entries * 8);
  file_.read(offset, bytes.io());
  Table out(entries);
  for (uint64_t i = 0; i < entries; ++i) out[i] = base::load_be<uint64_t>(bytes.data() + i * 8);
  return out;
}

base::Buffer& Repairer::read_cluster(uint64_t offset) {
  file_.read(offset, cluster_.io());
  return cluster_;
}

void Repairer::write_words(const Words& words) {
  std::vector<std::byte> bytes;
  for (size_t i = 0; i < words.size();) {
    const uint64_t start = words[i].first;
    bytes.clear();
    do {
      bytes.resize(bytes.size() + 8);
      base::store_be(bytes.data() + bytes.size() - 8, words[i].second);
      ++i;
    } while (i < words.size() && words[i].first == start + bytes.size());
    file_.write(start, base::SingleBuffer(std::span<const std::byte>(bytes)));
  }
}

void Repairer::write_changed(uint64_t offset, const base::Buffer& bytes, size_t begin, size_t end) {
  file_.write(offset + begin, base::SingleBuffer(bytes.span().subspan(begin, end - begin)));
}

}  // namespace minivmm::block::qcow2
