// SPDX-License-Identifier: Apache-2.0
// Makes the metadata that was changed in memory durable, in an order that leaves the image
// consistent wherever a crash cuts it. commit.cc describes the order.
//
// Owned by Image. Any loop, on fibers. One commit runs at a time; callers that arrive meanwhile
// share the next one.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>

#include "base/wait_queue.h"
#include "block/formats/qcow2/image_file.h"
#include "block/formats/qcow2/l1_table.h"
#include "block/formats/qcow2/metadata_cache.h"
#include "block/formats/qcow2/overlap.h"
#include "block/formats/qcow2/quarantine.h"
#include "block/formats/qcow2/refcounts.h"

namespace minivmm::block::qcow2 {

class Committer {
 public:
  // `data`: the external data file, or nullptr.
  Committer(ImageFile& image, Edge* data, const MetadataMap& metadata, L1Table& l1,
            MetadataCache& l2, MetadataCache& blocks, Refcounts& refcounts, Quarantine& quarantine);

  // Everything that was written before the call, data and metadata, is durable on return. Throws
  // the first error; then what was not written is tried again by the next commit.
  void commit();

  // Runs `work` while no commit runs; commits wait for it. Throws what it throws.
  void without_commit(const std::function<void()>& work);

  // The image is marked dirty on disk, so its refcounts need not be true there: they are written
  // when the cache is full of them, no longer with each commit. Not while a commit runs.
  void set_lazy_refcounts(bool lazy) noexcept { lazy_ = lazy; }

  // How many ran, for state dumps and tests.
  uint64_t commits() const;

 private:
  struct Changes;
  void run();
  void take(Changes& changes);
  void write(const Changes& changes);
  void finish(Changes& changes, bool ok);
  void write_slices(const std::vector<MetadataCache::Copy>& copies);
  void require_places(const Changes& changes);
  void require_place(uint64_t offset, uint64_t bytes, const char* what);

  ImageFile& image_;
  Edge* const data_;
  const MetadataMap& metadata_;
  L1Table& l1_;
  MetadataCache& l2_;
  MetadataCache& blocks_;
  Refcounts& refcounts_;
  Quarantine& quarantine_;

  std::atomic<bool> lazy_{false};
  mutable std::mutex mutex_;
  base::WaitQueue waiters_;
  bool running_ = false;  // guarded by mutex_, as are the rest
  uint64_t started_ = 0;
  uint64_t finished_ = 0;
  std::exception_ptr last_error_;  // of commit number finished_
};

}  // namespace minivmm::block::qcow2
