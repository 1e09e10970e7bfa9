// SPDX-License-Identifier: Apache-2.0
// Driver `fault`: makes chosen requests fail or wait, to test what stands above it. Options: file;
// op=read|write|zero|discard|flush|any, offset, length (only requests that touch that range), after
// (let so many through first), count (then spoil so many; 0 = all), errno=EIO|ENOSPC|... ("none":
// only delay), delay-ns. Several rules: several filters.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include "block/filters/filter_node.h"

namespace minivmm::block {

struct FaultRule {
  enum Op : uint8_t { kRead, kWrite, kZero, kDiscard, kFlush, kAny };
  Op op = kAny;
  uint64_t offset = 0;
  uint64_t length = ~uint64_t{0};
  uint64_t after = 0;
  uint64_t count = 0;
  int err = 0;  // 0: none
  std::chrono::nanoseconds delay{0};
};

class FaultNode final : public FilterNode {
 public:
  FaultNode(const NodeConfig& config, std::shared_ptr<Node> file, FaultRule rule);

 private:
  void driver_read(uint64_t offset, IoSpan to) override;
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override;
  void apply(FaultRule::Op op, uint64_t offset, uint64_t length);

  const FaultRule rule_;
  std::atomic<uint64_t> seen_{0};
};

std::shared_ptr<Node> open_fault(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
