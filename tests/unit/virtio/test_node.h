// SPDX-License-Identifier: Apache-2.0
// A disk in memory that does as it is told: holds requests, fails them, and writes down what it was
// asked. Any thread.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "base/sync.h"
#include "block/graph/node.h"

namespace minivmm::virtio {

class TestNode final : public block::Node {
 public:
  enum class Kind { kRead, kWrite, kZero, kDiscard, kFlush };
  struct Call {
    Kind kind;
    uint64_t offset = 0;
    uint64_t length = 0;
    bool fua = false;
    bool unmap = false;
    size_t buffers = 0;
  };

  explicit TestNode(uint64_t size, bool read_only = false, const block::Limits& limits = kLimits);

  static constexpr block::Limits kLimits{.optimal_io = 65536,
                                         .discard_granularity = 4096,
                                         .can_discard = true,
                                         .can_write_zeroes = true};

  // From now on requests wait until release().
  void hold() { held_.reset(); }
  void release() { held_.set(); }
  unsigned waiting() const { return waiting_; }
  // Called before each request, after any wait; may throw.
  void on_call(std::function<void(const Call&)> hook);
  void grow(uint64_t size);

  std::vector<Call> calls() const;
  std::vector<Call> calls(Kind kind) const;
  void forget_calls();
  std::vector<std::byte> content(uint64_t offset, uint64_t length) const;

 private:
  void driver_read(uint64_t offset, block::IoSpan to) override;
  void driver_write(uint64_t offset, block::IoSpan from, block::WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, block::ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override;
  void begin(const Call& call);

  base::Event held_;
  std::atomic<unsigned> waiting_{0};
  mutable std::mutex mutex_;
  std::function<void(const Call&)> hook_;
  std::vector<Call> calls_;
  std::vector<std::byte> data_;
};

}  // namespace minivmm::virtio
