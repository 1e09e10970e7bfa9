// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/bitmaps/bitmaps.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"
#include "base/checked.h"
#include "base/log.h"
#include "block/formats/qcow2/image.h"
#include "block/formats/qcow2/listing.h"

namespace minivmm::block::qcow2 {

using base::Error;

namespace {

constexpr size_t kMostBitmaps = 65535;

uint64_t data_bytes(uint64_t disk_size, unsigned granularity_bits) {
  return base::div_ceil(disk_size, uint64_t{8} << granularity_bits);
}

}  // namespace

Bitmaps::Bitmaps(Image& image, Allocator& allocator)
    : image_(image), store_(image.file(), allocator), disk_size_(image.file().header().size) {
  read_directory();
}

Bitmaps::~Bitmaps() { delete tracked_.load(); }

void Bitmaps::read_directory() {
  const Header& header = image_.file().header();
  extension_ = header.bitmaps;
  maintained_ = true;
  if (!extension_) return;
  try {
    if (extension_->directory_size > kMaxListBytes) throw Error(EINVAL, "it is too long");
    base::Buffer bytes(extension_->directory_size);
    image_.file().file().read(extension_->directory_offset, bytes.io());
    uint64_t position = 0;
    for (uint32_t i = 0; i < extension_->count; ++i) {
      auto bitmap = std::make_unique<Bitmap>(read_entry(bytes.span(), position));
      bitmaps_.push_back(std::move(bitmap));
    }
    std::vector<std::string_view> names;
    for (const auto& bitmap : bitmaps_) names.push_back(bitmap->entry.name);
    std::sort(names.begin(), names.end());
    if (std::adjacent_find(names.begin(), names.end()) != names.end()) {
      throw Error(EINVAL, "two bitmaps have the same name");
    }
  } catch (const Error& e) {
    base::log_warning("{}: the directory of its bitmaps is of no use: {}", image_.file().name(),
                      e.what());
    problem_ = "the directory of the bitmaps makes no sense; `minivmm image check -r all` drops it";
    maintained_ = false;
    bitmaps_.clear();
  }
}

Bitmaps::Bitmap Bitmaps::read_entry(std::span<const std::byte> directory,
                                    uint64_t& position) const {
  if (!base::range_fits(position, kBitmapFixedBytes, directory.size())) {
    throw Error(EINVAL, "it is too short");
  }
  Bitmap out;
  out.position = position;
  out.entry = decode_bitmap(directory.subspan(position, kBitmapFixedBytes));
  if (out.entry.name_bytes == 0 || out.entry.name_bytes > kMaxBitmapNameBytes ||
      !base::range_fits(position, out.entry.total_bytes(), directory.size())) {
    throw Error(EINVAL, fmt::format("the entry at {:#x} has an invalid length", position));
  }
  decode_bitmap_name(directory.subspan(position, out.entry.total_bytes()), out.entry);
  position += out.entry.total_bytes();
  out.on_disk = true;
  out.enabled = (out.entry.flags & kBitmapAuto) != 0;
  const char* problem =
      bitmap_problem(out.entry, image_.file().geometry(), disk_size_, image_.file().size());
  if (problem != nullptr) {
    base::log_warning("{}: bitmap '{}' is of no use: {}", image_.file().name(), out.entry.name,
                      problem);
  }
  out.inconsistent = problem != nullptr || (out.entry.flags & kBitmapInUse) != 0;
  return out;
}

// --- Marking ---

void Bitmaps::mark_tracked(uint64_t offset, uint64_t length) {
  const base::Epoch::Pin pin(marking_);
  const Tracked* const tracked = tracked_.load(std::memory_order_acquire);
  if (tracked == nullptr) return;
  for (DirtyBits* bits : *tracked) bits->mark(offset, length);
}

void Bitmaps::publish(const std::vector<DirtyBits*>& also) {
  auto next = std::make_unique<Tracked>(also);
  for (const auto& bitmap : bitmaps_) {
    if (bitmap->enabled && !bitmap->inconsistent && bitmap->bits) {
      next->push_back(bitmap->bits.get());
    }
  }
  const Tracked* fresh = next->empty() ? nullptr : next.release();
  const std::unique_ptr<const Tracked> old(tracked_.exchange(fresh, std::memory_order_acq_rel));
  if (old) marking_.synchronize();
}

DirtyBits& Bitmaps::bits_of(Bitmap& bitmap) {
  if (bitmap.bits) return *bitmap.bits;
  auto bits = std::make_unique<DirtyBits>(disk_size_, bitmap.entry.granularity_bits);
  if (bitmap.on_disk) store_.read_bits(bitmap.entry, *bits, memory_left_);
  bitmap.bits = std::move(bits);
  return *bitmap.bits;
}

// One that cannot be read is not kept up to date: the disk is worth more.
bool Bitmaps::try_bits_of(Bitmap& bitmap) noexcept {
  try {
    (void)bits_of(bitmap);
    return true;
  } catch (const std::exception& e) {
    base::log_warning("{}: bitmap '{}' cannot be read and is inconsistent from now on: {}",
                      image_.file().name(), bitmap.entry.name, e.what());
    bitmap.inconsistent = true;
    return false;
  }
}

void Bitmaps::before_first_write() {
  if (!maintained_) return;
  const std::lock_guard lock(changing_);
  for (const auto& bitmap : bitmaps_) {
    if (bitmap->enabled && !bitmap->inconsistent) (void)try_bits_of(*bitmap);
  }
  mark_in_use(false);
  publish();
  guard_places();
}

void Bitmaps::guard_places() {
  if (!extension_) return;
  const Geometry& g = image_.file().geometry();
  MetadataMap& map = image_.metadata();
  map.add_beside(extension_->directory_offset >> g.cluster_bits,
                 g.clusters(extension_->directory_size), kBitmapDirectory);
  for (const auto& bitmap : bitmaps_) {
    const BitmapEntry& e = bitmap->entry;
    if (!bitmap->on_disk || bitmap_problem(e, g, 0, image_.file().size()) != nullptr) continue;
    map.add_beside(e.table_offset >> g.cluster_bits, g.clusters(uint64_t{e.table_size} * 8),
                   kBitmapTable);
  }
}

// On disk: those that are "auto" there, or all. The flag is a bit of one byte, so writes that a
// crash tears apart leave some marked and others not, and nothing was changed yet.
void Bitmaps::mark_in_use(bool all) {
  bool wrote = false;
  for (const auto& bitmap : bitmaps_) {
    const bool wanted = all || (bitmap->entry.flags & kBitmapAuto) != 0;
    if (wanted && mark_in_use(*bitmap)) wrote = true;
  }
  // Those that were removed and are still on disk are freed by a store; until then a crash brings
  // them back, and they have missed changes since.
  if (wrote) image_.file().file().flush();
}

// Not durable yet. False: it is marked already, or not on disk.
bool Bitmaps::mark_in_use(Bitmap& bitmap) {
  BitmapEntry& entry = bitmap.entry;
  if (!bitmap.on_disk || (entry.flags & kBitmapInUse) != 0) return false;
  std::byte flags[4];
  base::store_be(flags, entry.flags | kBitmapInUse);
  image_.file().file().write(extension_->directory_offset + bitmap.position + kBitmapFlagsField,
                             base::SingleBuffer(std::span<const std::byte>(flags)));
  entry.flags |= kBitmapInUse;
  bitmap.marked = true;
  bitmap.changed = !bitmap.inconsistent;
  return true;
}

void Bitmaps::before_change(Bitmap& bitmap) {
  if (mark_in_use(bitmap)) image_.file().file().flush();
}

void Bitmaps::prepare_resize() {
  if (!maintained_) return;
  const std::lock_guard lock(changing_);
  for (const auto& bitmap : bitmaps_) {
    if (!bitmap->inconsistent) (void)try_bits_of(*bitmap);
  }
  mark_in_use(true);
  publish();
}

void Bitmaps::resize(uint64_t disk_size) {
  if (!maintained_) return;
  const std::lock_guard lock(changing_);
  std::vector<std::unique_ptr<DirtyBits>> old(bitmaps_.size());
  Tracked also;
  for (size_t i = 0; i < bitmaps_.size(); ++i) {
    Bitmap& bitmap = *bitmaps_[i];
    if (!bitmap.bits) continue;
    old[i] = std::exchange(bitmap.bits,
                           std::make_unique<DirtyBits>(disk_size, bitmap.entry.granularity_bits));
    bitmap.changed = true;
    if (bitmap.enabled) also.push_back(old[i].get());
  }
  disk_size_ = disk_size;
  // From here on changes are noted in the new ones; what the old ones knew is added.
  publish(also);
  for (size_t i = 0; i < old.size(); ++i) {
    if (old[i]) bitmaps_[i]->bits->merge(*old[i]);
  }
  publish();
}

// --- What users ask for ---

Bitmaps::Bitmap& Bitmaps::find(std::string_view name) {
  for (const auto& bitmap : bitmaps_) {
    if (bitmap->entry.name == name) return *bitmap;
  }
  throw Error(ENOENT, fmt::format("Dirty bitmap '{}' not found", name));
}

Bitmaps::Bitmap& Bitmaps::find_consistent(std::string_view name) {
  Bitmap& out = find(name);
  if (!out.inconsistent) return out;
  throw Error(EINVAL, fmt::format("Bitmap '{}' is inconsistent and cannot be used", name));
}

void Bitmaps::require_changeable() const {
  if (!image_.file().writable()) {
    throw Error(EROFS, image_.file().name() + ": the image is open read-only");
  }
  if (problem_ != nullptr) {
    throw Error(EINVAL, fmt::format("{}: {}", image_.file().name(), problem_));
  }
}

std::vector<DirtyBitmaps::Info> Bitmaps::list() const {
  const std::lock_guard lock(changing_);
  std::vector<Info> out;
  for (const auto& bitmap : bitmaps_) {
    const BitmapEntry& entry = bitmap->entry;
    const uint64_t granularity = uint64_t{1} << (entry.granularity_bits & 63);
    out.push_back({entry.name, granularity, bitmap->enabled, bitmap->inconsistent});
    if (bitmap->bits) out.back().dirty_bytes = bitmap->bits->count() * granularity;
  }
  return out;
}

DirtyBitmaps::Status Bitmaps::status(std::string_view name, uint64_t offset, uint64_t length) {
  const std::lock_guard lock(changing_);
  const DirtyBits& bits = bits_of(find_consistent(name));
  if (offset >= bits.disk_size()) return {length, false};
  const DirtyBits::Run run = bits.run_at(offset, std::min(length, bits.disk_size() - offset));
  return {run.length, run.dirty};
}

void Bitmaps::check_new(std::string_view name, uint64_t granularity) const {
  if (name.empty()) throw Error(EINVAL, "Bitmap name cannot be empty");
  if (name.size() > kMaxBitmapNameBytes) {
    throw Error(EINVAL, "Bitmap name too long");
  }
  const uint64_t most = uint64_t{1} << kMaxBitmapGranularityBits;
  if (!std::has_single_bit(granularity) || granularity < 512 || granularity > most) {
    throw Error(EINVAL, "Granularity must be power of 2 and at least 512");
  }
  for (const auto& bitmap : bitmaps_) {
    if (bitmap->entry.name == name) {
      throw Error(EEXIST, fmt::format("Bitmap already exists: {}", name));
    }
  }
  if (image_.file().geometry().version < 3) {
    throw Error(ENOTSUP, "Cannot store dirty bitmaps in qcow2 v2 files");
  }
  if (bitmaps_.size() >= kMostBitmaps) {
    throw Error(EFBIG, "Maximum number of persistent bitmaps is already reached");
  }
  if (data_bytes(disk_size_, static_cast<unsigned>(std::countr_zero(granularity))) >
      kMaxBitmapBytes) {
    throw Error(EFBIG, "Too much space will be occupied by the bitmap. Use larger granularity");
  }
}

void Bitmaps::add(std::string_view name, uint64_t granularity, bool enabled) {
  require_changeable();
  const std::lock_guard lock(changing_);
  const uint64_t cluster_size = image_.file().geometry().cluster_size();
  if (granularity == 0) granularity = std::clamp<uint64_t>(cluster_size, 4096, 65536);
  check_new(name, granularity);
  auto bitmap = std::make_unique<Bitmap>();
  bitmap->entry.name = name;
  bitmap->entry.name_bytes = static_cast<uint16_t>(name.size());
  bitmap->entry.type = kDirtyTracking;
  bitmap->entry.granularity_bits = static_cast<uint8_t>(std::countr_zero(granularity));
  bitmap->enabled = enabled;
  bitmap->changed = true;
  (void)bits_of(*bitmap);
  bitmaps_.push_back(std::move(bitmap));
  publish();
}

void Bitmaps::remove(std::string_view name) {
  require_changeable();
  image_.prepare_write();
  const std::lock_guard lock(changing_);
  Bitmap& found = find(name);
  before_change(found);
  const auto it = std::find_if(bitmaps_.begin(), bitmaps_.end(),
                               [&](const auto& bitmap) { return bitmap.get() == &found; });
  const std::unique_ptr<Bitmap> bitmap = std::move(*it);
  bitmaps_.erase(it);
  header_differs_ = true;
  publish();
  if (bitmap->on_disk) removed_.push_back(std::move(bitmap->entry));
}

void Bitmaps::clear(std::string_view name) {
  require_changeable();
  const std::lock_guard lock(changing_);
  Bitmap& bitmap = find_consistent(name);
  if (!bitmap.bits) {
    // What the image has is not needed.
    bitmap.bits = std::make_unique<DirtyBits>(disk_size_, bitmap.entry.granularity_bits);
    publish();
  }
  bitmap.bits->clear();
  bitmap.changed = true;
}

void Bitmaps::set_enabled(std::string_view name, bool enabled) {
  require_changeable();
  image_.prepare_write();
  const std::lock_guard lock(changing_);
  Bitmap& bitmap = find_consistent(name);
  if (bitmap.enabled == enabled) return;
  (void)bits_of(bitmap);
  before_change(bitmap);
  bitmap.enabled = enabled;
  bitmap.changed = true;
  publish();
}

void Bitmaps::merge(std::string_view name, DirtyBitmaps& from, std::string_view other) {
  require_changeable();
  image_.prepare_write();
  uint64_t disk_size = 0;
  {
    const std::lock_guard lock(changing_);
    Bitmap& bitmap = find_consistent(name);
    (void)bits_of(bitmap);
    before_change(bitmap);
    disk_size = disk_size_;
  }
  // Not under the lock: `from` may be this very set.
  for (uint64_t at = 0; at < disk_size;) {
    const Status status = from.status(other, at, disk_size - at);
    if (status.dirty) {
      const std::lock_guard lock(changing_);
      bits_of(find_consistent(name)).mark(at, status.length);
    }
    at += status.length;
  }
  const std::lock_guard lock(changing_);
  find_consistent(name).changed = true;
}

}  // namespace minivmm::block::qcow2
