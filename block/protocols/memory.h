// SPDX-License-Identifier: Apache-2.0
// Driver `memory`: a disk in anonymous memory, sparse until written. Option: size. Gone with the
// process; flush does nothing.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <shared_mutex>

#include "block/graph/driver.h"
#include "block/graph/node.h"

namespace minivmm::block {

class MemoryNode final : public Node {
 public:
  // Throws ENOMEM. `size` at most 1 TiB. It can grow to `capacity`, at least its size; address
  // space is taken for that, memory only for what is written.
  MemoryNode(const NodeConfig& config, uint64_t size, uint64_t capacity = 0);
  ~MemoryNode() override;

 private:
  // Requests lock the stripes that they touch one after the other, for the time of a copy: whole
  // stripes are read and written as one, and the threads' accesses never race.
  static constexpr uint64_t kStripe = 64 * 1024;
  static constexpr size_t kLocks = 64;

  void driver_read(uint64_t offset, IoSpan to) override;
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override {}
  void driver_truncate(uint64_t new_size) override;
  std::shared_mutex& lock_of(uint64_t offset) noexcept { return locks_[offset / kStripe % kLocks]; }
  template <typename Work>
  void for_each_stripe(uint64_t offset, uint64_t length, Work work);

  std::byte* data_ = nullptr;
  uint64_t capacity_ = 0;
  std::array<std::shared_mutex, kLocks> locks_;
};

std::shared_ptr<Node> open_memory(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
