// SPDX-License-Identifier: Apache-2.0
// A file that may grow only so far: what would make it larger fails with ENOSPC. Counted is how far
// it has ever reached, not what holes in it gave back: a format on it uses those again.
//
// Not made by options: the bound may be shared with other nodes (SpaceBudget).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "block/filters/filter_node.h"

namespace minivmm::block {

// Bytes that several nodes share. Any thread.
class SpaceBudget {
 public:
  explicit SpaceBudget(uint64_t bytes) noexcept : total_(bytes) {}
  SpaceBudget(const SpaceBudget&) = delete;
  SpaceBudget& operator=(const SpaceBudget&) = delete;

  uint64_t total() const noexcept { return total_; }
  uint64_t used() const noexcept { return used_.load(std::memory_order_relaxed); }
  bool try_take(uint64_t bytes) noexcept;
  // What is there already, even if that is too much.
  void take_over(uint64_t bytes) noexcept { used_.fetch_add(bytes, std::memory_order_relaxed); }
  void give_back(uint64_t bytes) noexcept { used_.fetch_sub(bytes, std::memory_order_relaxed); }

 private:
  const uint64_t total_;
  std::atomic<uint64_t> used_{0};
};

class QuotaNode final : public FilterNode {
 public:
  // `limit`: of this file, in bytes. `shared` may be empty; what the file holds is given back to it
  // when the node is gone. A file that is larger already stays so.
  QuotaNode(const NodeConfig& config, std::shared_ptr<Node> file, uint64_t limit,
            std::shared_ptr<SpaceBudget> shared);
  ~QuotaNode() override;

 private:
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_truncate(uint64_t new_size) override;
  void charge(uint64_t end);

  const uint64_t limit_;
  const std::shared_ptr<SpaceBudget> shared_;
  std::mutex growing_;
  std::atomic<uint64_t> charged_;  // raised under growing_
};

}  // namespace minivmm::block
