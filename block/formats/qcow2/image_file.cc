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
      incompatible_(header_.incompatible) {}

void ImageFile::require_intact() const {
  if (broken()) {
    throw Error(EIO, name_ +
                         ": corrupt metadata was found, so the image is not written to; "
                         "close it and run `qemu-img check -r all`");
  }
}

Error ImageFile::corruption(const std::string& text) {
  if (!broken_.exchange(true, std::memory_order_acq_rel)) {
    base::log_error("{}: the image is corrupt: {}{}", name_, text,
                    writable_ ? "; no more writes are done to it" : "");
    if (writable_) mark_corrupt();
  }
  return Error(EIO, fmt::format("{}: the image is corrupt: {}; `qemu-img check -r all` may help",
                                name_, text));
}

void ImageFile::mark_corrupt() {
  if (geometry_.version < 3) return;  // version 2 has no such bit
  try {
    const std::lock_guard lock(header_lock_);
    const uint64_t bits = incompatible() | kIncompatCorrupt;
    std::array<std::byte, 8> field;
    base::store_be(field.data(), bits);
    write_field(kIncompatibleField, field);
    incompatible_.store(bits, std::memory_order_relaxed);
  } catch (const Error& e) {
    base::log_error("{}: the corrupt bit could not be set: {}", name_, e.what());
  }
}

void ImageFile::clear_autoclear() {
  const uint64_t kept = header_.raw_data() ? kAutoclearRawData : 0;
  if (header_.autoclear == kept) return;
  const std::lock_guard lock(header_lock_);
  std::array<std::byte, 8> field;
  base::store_be(field.data(), kept);
  write_field(kAutoclearField, field);
  if ((header_.autoclear & kAutoclearBitmaps) != 0) {
    base::log_warning(
        "{}: its persistent bitmaps are out of date from now on: this program does "
        "not maintain them",
        name_);
  }
}

void ImageFile::set_refcount_table(uint64_t offset, uint32_t clusters) {
  const std::lock_guard lock(header_lock_);
  // Both fields lie in one sector and are written at once: a crash leaves the old or the new.
  std::array<std::byte, 12> field;
  base::store_be(field.data(), offset);
  base::store_be(field.data() + 8, clusters);
  write_field(kRefcountTableField, field);
}

void ImageFile::write_field(uint64_t offset, std::span<const std::byte> bytes) {
  file_->write(offset, base::SingleBuffer(bytes));
  file_->flush();
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
