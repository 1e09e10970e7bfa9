// SPDX-License-Identifier: Apache-2.0
// The active L1 table: in memory as a whole, as host-order atomics, because every lookup begins
// here. Changed entries are remembered for the next commit, which writes exactly those: a
// neighbour that was set a moment later must not reach the disk before what it points to.
//
// Owned by Image. Any loop.
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

  uint32_t size() const noexcept { return size_; }
  uint64_t get(uint64_t index) const noexcept {
    return entries_[index].load(std::memory_order_acquire);
  }
  void set(uint64_t index, uint64_t value);

  // --- The commit; one at a time ---
  using Changes = std::vector<std::pair<uint32_t, uint64_t>>;  // by index, ascending
  Changes take_dirty();
  void write(const Changes& changes);
  void failed(const Changes& changes);

 private:
  ImageFile& image_;
  const uint32_t size_;
  std::unique_ptr<std::atomic<uint64_t>[]> entries_;
  std::mutex mutex_;
  std::vector<uint32_t> dirty_;  // guarded by mutex_
};

}  // namespace minivmm::block::qcow2
