// SPDX-License-Identifier: Apache-2.0
// The host file of a qcow2 image with its header: what every other part of the driver stands on.
// It also holds the image's verdict: once metadata was found corrupt, writes are refused for the
// rest of the node's life, and the image is marked where it can be.
//
// Owned by Image. Any loop; methods that do I/O run on a fiber.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "base/error.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/header_update.h"
#include "block/graph/edge.h"

namespace minivmm::block::qcow2 {

class ImageFile {
 public:
  // `name` begins every message.
  ImageFile(std::unique_ptr<Edge> file, Header header, bool writable, std::string name);
  ImageFile(const ImageFile&) = delete;
  ImageFile& operator=(const ImageFile&) = delete;

  Edge& file() const noexcept { return *file_; }
  const Geometry& geometry() const noexcept { return geometry_; }
  // As it was when the image was opened. Where it has changed since: header_update().current().
  const Header& header() const noexcept { return header_; }
  uint64_t incompatible() const noexcept { return incompatible_.load(std::memory_order_relaxed); }
  uint64_t size() const noexcept { return file_->size(); }
  bool writable() const noexcept { return writable_; }
  const std::string& name() const noexcept { return name_; }

  // Told once, when corruption is found. Before the first request.
  void on_corruption(std::function<void(const std::string& text)> listener) {
    on_corruption_ = std::move(listener);
  }
  // Corruption was found since the image was opened.
  bool broken() const noexcept { return broken_.load(std::memory_order_acquire); }
  // Throws EIO if it is broken.
  void require_intact() const;
  // Records that the metadata is corrupt: writes fail from now on, and a writable version 3 image
  // gets its corrupt bit. Returns the error to throw. Fiber; no lock may be held.
  base::Error corruption(const std::string& text);

  // Before the first change: clears the autoclear bits (but for `maintained` ones and "raw data",
  // which is kept true), which promise things about other parts of the image that this driver does
  // not maintain. Durable on return.
  void clear_autoclear(uint64_t maintained);
  // The refcounts on disk may be wrong, or are true again. Durable on return.
  void set_dirty(bool dirty);
  // Points the header at another refcount table. Durable on return.
  void set_refcount_table(uint64_t offset, uint32_t clusters);
  // HeaderUpdate::change_numbers where what follows depends on which header is on disk: after an
  // error it is the old one, or writes are stopped.
  void change_numbers(const HeaderUpdate::Change& change);
  // For whoever changes other parts of the header.
  HeaderUpdate& header_update() noexcept { return header_update_; }
  // What is on disk is in doubt and writing on could damage it: writes are refused from now on.
  // Nothing is known to be corrupt.
  void stop_writes(const std::string& text);

 private:
  void mark_corrupt();

  std::unique_ptr<Edge> file_;
  const Header header_;
  const Geometry geometry_;
  const bool writable_;
  const std::string name_;
  std::function<void(const std::string& text)> on_corruption_;
  std::atomic<bool> broken_{false};
  std::atomic<uint64_t> incompatible_;
  HeaderUpdate header_update_;
};

// Reads and parses the header of the image in `file`. Throws EINVAL. Fiber.
Header read_header(Edge& file);

}  // namespace minivmm::block::qcow2
