// SPDX-License-Identifier: Apache-2.0
#include "block/filters/quota.h"

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::block {

using base::Error;

bool SpaceBudget::try_take(uint64_t bytes) noexcept {
  uint64_t used = used_.load(std::memory_order_relaxed);
  do {
    if (used > total_ || bytes > total_ - used) return false;
  } while (!used_.compare_exchange_weak(used, used + bytes, std::memory_order_relaxed));
  return true;
}

QuotaNode::QuotaNode(const NodeConfig& config, std::shared_ptr<Node> file, uint64_t limit,
                     std::shared_ptr<SpaceBudget> shared)
    : FilterNode(config, "quota", std::move(file)),
      limit_(limit),
      shared_(std::move(shared)),
      charged_(size()) {
  if (shared_) shared_->take_over(size());
}

QuotaNode::~QuotaNode() {
  if (shared_) shared_->give_back(charged_.load(std::memory_order_relaxed));
}

// Before the file grows; what is charged stays so where that fails.
void QuotaNode::charge(uint64_t end) {
  if (end <= charged_.load(std::memory_order_acquire)) return;
  const std::lock_guard lock(growing_);
  const uint64_t charged = charged_.load(std::memory_order_relaxed);
  if (end <= charged) return;
  if (end > limit_) {
    throw Error(ENOSPC, fmt::format("{}: is full ({} bytes)", describe(), limit_));
  }
  if (shared_ && !shared_->try_take(end - charged)) {
    throw Error(ENOSPC, fmt::format("{}: the {} bytes that it shares with others are used up",
                                    describe(), shared_->total()));
  }
  charged_.store(end, std::memory_order_release);
}

void QuotaNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  charge(offset + from.bytes());
  FilterNode::driver_write(offset, from, flags);
}

void QuotaNode::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  charge(offset + length);
  FilterNode::driver_write_zeroes(offset, length, flags);
}

void QuotaNode::driver_truncate(uint64_t new_size) {
  charge(new_size);
  FilterNode::driver_truncate(new_size);
}

}  // namespace minivmm::block
