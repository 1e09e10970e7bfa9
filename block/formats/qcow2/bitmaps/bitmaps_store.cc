// SPDX-License-Identifier: Apache-2.0
// Bitmaps::store: what has changed goes to the image.
//
// The order: bits, tables and the directory are written to new clusters; a commit makes them and
// their refcounts durable; the header, in one write, points to the new directory, and with that
// the marks "in use" are gone; the old clusters go to the quarantine. A crash before the header's
// write leaves the old bitmaps, marked where they have missed something; after it, the new ones.
// Clusters of the other side are leaks.
#include <algorithm>
#include <exception>
#include <utility>

#include "base/log.h"
#include "block/formats/qcow2/bitmaps/bitmaps.h"
#include "block/formats/qcow2/image.h"

namespace minivmm::block::qcow2 {

bool Bitmaps::nothing_to_store() const {
  return !header_differs_ && std::none_of(bitmaps_.begin(), bitmaps_.end(),
                                          [](const auto& bitmap) { return bitmap->changed; });
}

// The clusters of a bitmap on disk. Where its table makes no sense they are leaked: what it points
// to may be anything.
void Bitmaps::collect_old(std::vector<HostClusters>& out, const BitmapEntry& entry) {
  const ImageFile& file = image_.file();
  const char* problem = bitmap_problem(entry, file.geometry(), 0, file.size());
  try {
    if (problem != nullptr) throw base::Error(EINVAL, problem);
    const std::vector<HostClusters> clusters = store_.clusters_of(entry);
    out.insert(out.end(), clusters.begin(), clusters.end());
  } catch (const std::exception& e) {
    base::log_warning("{}: the clusters of bitmap '{}' are not freed: {}", file.name(), entry.name,
                      e.what());
  }
}

// The directory's new entries, with what has changed written.
std::vector<BitmapEntry> Bitmaps::write_all() {
  std::vector<BitmapEntry> out;
  for (const auto& bitmap : bitmaps_) {
    BitmapEntry entry = bitmap->entry;
    if (bitmap->changed) {
      store_.write_bits(bits_of(*bitmap), entry);
      entry.flags &= kBitmapExtraCompatible;
      if (bitmap->enabled) entry.flags |= kBitmapAuto;
    }
    out.push_back(std::move(entry));
  }
  return out;
}

void Bitmaps::switch_header(const std::optional<BitmapsExtension>& extension) {
  image_.file().header_update().rewrite([&](Header& h) {
    h.bitmaps = extension;
    if (extension) {
      h.autoclear |= kAutoclearBitmaps;
    } else {
      h.autoclear &= ~kAutoclearBitmaps;
    }
    // Bitmaps that were out of date: nothing points to them from now on.
    std::erase_if(h.unknown_extensions,
                  [](const HeaderExtension& e) { return e.type == kExtBitmaps; });
  });
}

void Bitmaps::store() {
  {
    const std::lock_guard lock(changing_);
    if (!maintained_ || nothing_to_store() || image_.file().broken()) return;
  }
  image_.prepare_write();
  const std::lock_guard lock(changing_);
  const Geometry& g = image_.file().geometry();
  std::vector<HostClusters> old;
  if (extension_) {
    old.push_back(
        {extension_->directory_offset >> g.cluster_bits, g.clusters(extension_->directory_size)});
  }
  for (const BitmapEntry& entry : removed_) collect_old(old, entry);
  for (const auto& bitmap : bitmaps_) {
    if (bitmap->on_disk && bitmap->changed) collect_old(old, bitmap->entry);
  }
  std::vector<BitmapEntry> entries;
  std::optional<BitmapsExtension> extension;
  std::exception_ptr error;
  try {
    entries = write_all();
    if (!entries.empty()) extension = store_.write_directory(entries);
    image_.commit();
  } catch (...) {
    error = std::current_exception();
  }
  if (error) {
    store_.give_back();
    std::rethrow_exception(error);
  }
  // From here on the header may point to them, also after an error.
  store_.keep();
  switch_header(extension);
  for (const HostClusters& clusters : old) {
    image_.metadata().remove_beside(clusters.first, clusters.count);
    image_.drop(clusters);
  }
  uint64_t position = 0;
  for (size_t i = 0; i < bitmaps_.size(); ++i) {
    Bitmap& bitmap = *bitmaps_[i];
    bitmap.entry = std::move(entries[i]);
    bitmap.position = std::exchange(position, position + bitmap.entry.total_bytes());
    bitmap.on_disk = true;
    bitmap.changed = bitmap.marked = false;
  }
  removed_.clear();
  extension_ = extension;
  header_differs_ = false;
  guard_places();
}

}  // namespace minivmm::block::qcow2
