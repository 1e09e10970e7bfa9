// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/image_file.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"
#include "base/log.h"

namespace minivmm::block::qcow2 {

using base::Error;

ImageFile::ImageFile(std::unique_ptr<Edge> file, Header header, bool writable, std::string name)
    : file_(std::move(file)),
      header_(std::move(header)),
      geometry_(header_.geometry()),
      writable_(writable),
      name_(std::move(name)),
      incompatible_(header_.incompatible),
      header_update_(*file_, header_) {}

void ImageFile::require_intact() const {
  if (broken()) {
    throw Error(EIO, name_ +
                         ": its metadata was found corrupt or in doubt, so the image is not "
                         "written to; close it and run `minivmm image check -r all`");
  }
}

Error ImageFile::corruption(const std::string& text) {
  if (!broken_.exchange(true, std::memory_order_acq_rel)) {
    base::log_error("{}: the image is corrupt: {}{}", name_, text,
                    writable_ ? "; no more writes are done to it" : "");
    if (writable_) mark_corrupt();
    if (on_corruption_) on_corruption_(text);
  }
  return Error(
      EIO, fmt::format("{}: the image is corrupt: {}; `minivmm image check -r all` may help", name_,
                       text));
}

void ImageFile::stop_writes(const std::string& text) {
  if (broken_.exchange(true, std::memory_order_acq_rel)) return;
  base::log_error("{}: {}; no more writes are done to the image", name_, text);
}

void ImageFile::mark_corrupt() {
  if (geometry_.version < 3) return;  // version 2 has no such bit
  try {
    header_update_.change_numbers([](Header& h) { h.incompatible |= kIncompatCorrupt; });
    incompatible_.fetch_or(kIncompatCorrupt, std::memory_order_relaxed);
  } catch (const Error& e) {
    base::log_error("{}: the corrupt bit could not be set: {}", name_, e.what());
  }
}

void ImageFile::clear_autoclear(uint64_t maintained) {
  const uint64_t kept =
      header_.autoclear & (maintained | (header_.raw_data() ? kAutoclearRawData : 0));
  if (header_.autoclear == kept) return;
  header_update_.change_numbers([&](Header& h) { h.autoclear = kept; });
}

void ImageFile::set_dirty(bool dirty) {
  header_update_.change_numbers([&](Header& h) {
    h.incompatible = dirty ? h.incompatible | kIncompatDirty : h.incompatible & ~kIncompatDirty;
  });
}

void ImageFile::set_refcount_table(uint64_t offset, uint32_t clusters) {
  header_update_.change_numbers([&](Header& h) {
    h.refcount_table_offset = offset;
    h.refcount_table_clusters = clusters;
  });
}

void ImageFile::change_numbers(const HeaderUpdate::Change& change) {
  try {
    header_update_.change_numbers(change);
  } catch (const Error& e) {
    // It may have reached the disk.
    try {
      header_update_.change_numbers([](Header&) {});
    } catch (const Error&) {
      stop_writes(fmt::format(
          "the header could not be written ({}), so it is not known what it says", e.what()));
    }
    throw;
  }
}

Header read_header(Edge& file) {
  const uint64_t file_size = file.size();
  std::array<std::byte, 24> start{};
  const size_t start_size = std::min<uint64_t>(start.size(), file_size);
  file.read(0, base::SingleBuffer(start.data(), start_size));
  const uint64_t cluster = first_cluster_size(std::span(start).first(start_size));
  base::Buffer bytes(std::min(cluster, file_size));
  file.read(0, bytes.io());
  return parse_header(bytes.span(), file_size);
}

}  // namespace minivmm::block::qcow2
