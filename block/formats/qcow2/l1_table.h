// SPDX-License-Identifier: Apache-2.0
// The active L1 table: in memory as a whole, as host-order atomics, because every lookup begins
// here. Changed entries are remembered for the next commit, which writes exactly those: a
// neighbour that was set a moment later must not reach the disk before what it points to.
//
// It can become larger while it is used: then it has a new array, and mostly a new place in the
// file. The old array has to live until every request that may look at it has ended.
//
// Owned by Image. Any loop; a lookup pins the node's epoch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "block/formats/qcow2/image_file.h"

namespace minivmm::block::qcow2 {

class L1Table {
 public:
  // Reads the table. Fiber.
  explicit L1Table(ImageFile& image);

  uint32_t size() const noexcept { return size_.load(std::memory_order_acquire); }
  uint64_t get(uint64_t index) const noexcept {
    return entries_.load(std::memory_order_acquire)[index].load(std::memory_order_acquire);
  }
  void set(uint64_t index, uint64_t value);

  // --- The commit; one at a time ---
  using Changes = std::vector<std::pair<uint32_t, uint64_t>>;  // by index, ascending
  Changes take_dirty();
  void write(const Changes& changes);
  void failed(const Changes& changes);

  // --- Growing; no commit runs meanwhile, and one at a time ---
  using Entries = std::unique_ptr<std::atomic<uint64_t>[]>;
  uint64_t offset() const noexcept { return offset_; }
  // Copies what the file has to `offset`, with zeroes up to `size` entries (offset() itself: only
  // the zeroes). Not durable yet.
  void write_copy(uint64_t offset, uint32_t size);
  // The header points there now. Returns the array that was in use.
  Entries move(uint64_t offset, Entries larger, uint32_t size);
  // Another table, which the file has at `offset`, takes its place. While no request is in flight.
  void replace(uint64_t offset, const std::vector<uint64_t>& entries);

 private:
  ImageFile& image_;
  std::atomic<uint32_t> size_;
  uint64_t offset_;  // changes only while no commit runs
  Entries owned_;
  std::atomic<std::atomic<uint64_t>*> entries_;
  std::mutex mutex_;             // also held while entries_ changes
  std::vector<uint32_t> dirty_;  // guarded by mutex_
};

}  // namespace minivmm::block::qcow2
