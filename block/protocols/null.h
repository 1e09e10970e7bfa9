// SPDX-License-Identifier: Apache-2.0
// Driver `null` (QEMU's `null-co`): takes every write, reads as zeroes. For measuring everything
// above it. Options: size, latency-ns.
#pragma once

#include <chrono>
#include <memory>

#include "block/graph/driver.h"
#include "block/graph/node.h"

namespace minivmm::block {

class NullNode final : public Node {
 public:
  NullNode(const NodeConfig& config, uint64_t size, std::chrono::nanoseconds latency);

 private:
  void driver_read(uint64_t offset, IoSpan to) override;
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override;
  BlockStatus driver_block_status(uint64_t offset, uint64_t length) override;
  void wait() const;

  const std::chrono::nanoseconds latency_;
};

std::shared_ptr<Node> open_null(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
