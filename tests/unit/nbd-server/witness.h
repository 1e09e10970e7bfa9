// SPDX-License-Identifier: Apache-2.0
// A node that writes down what it is asked for: what became of a client's flags.
#pragma once

#include <string>

#include <mutex>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "block/graph/node.h"

namespace minivmm::nbd {

class Witness final : public block::Node {
 public:
  explicit Witness(const std::string& name) : Node(name, "witness", false) {
    set_size(1 << 20);
    block::Limits limits;
    limits.can_discard = limits.can_write_zeroes = true;
    set_limits(limits);
  }

  // Since the last call.
  std::vector<std::string> seen() {
    const std::lock_guard lock(mutex_);
    return std::exchange(seen_, {});
  }

 private:
  void add(std::string text) {
    const std::lock_guard lock(mutex_);
    seen_.push_back(std::move(text));
  }
  void driver_read(uint64_t, base::IoSpan) override {}
  void driver_write(uint64_t offset, base::IoSpan from, block::WriteFlags flags) override {
    add(fmt::format("write {}+{}{}", offset, from.bytes(), flags.fua ? " fua" : ""));
  }
  void driver_write_zeroes(uint64_t offset, uint64_t length, block::ZeroFlags flags) override {
    add(fmt::format("zero {}+{}{}{}{}", offset, length, flags.fua ? " fua" : "",
                    flags.may_unmap ? " unmap" : "", flags.no_fallback ? " fast" : ""));
  }
  void driver_discard(uint64_t offset, uint64_t length) override {
    add(fmt::format("discard {}+{}", offset, length));
  }
  void driver_flush() override { add("flush"); }

  std::mutex mutex_;
  std::vector<std::string> seen_;  // guarded by mutex_
};

}  // namespace minivmm::nbd
