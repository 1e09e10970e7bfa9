// SPDX-License-Identifier: Apache-2.0
// Whether the parts in which the answer to a READ came are all of it. A server may say that it is
// done without having sent everything, and then what was in the buffer before would pass for data.
// Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace minivmm::block {

class ReadCoverage {
 public:
  ReadCoverage(uint64_t offset, uint64_t length) noexcept : next_(offset), end_(offset + length) {}

  // Data or a hole arrived. Parts may come in any order; so many out of their order as no server
  // has a reason for are not believed.
  void add(uint64_t offset, uint64_t length) noexcept;

  // True if every byte came, and none twice.
  bool complete() noexcept;

 private:
  static constexpr size_t kMostPieces = 4096;

  uint64_t next_;  // all before it is there
  const uint64_t end_;
  bool wrong_ = false;
  std::vector<std::pair<uint64_t, uint64_t>> pieces_;  // behind next_: where they begin and end
};

}  // namespace minivmm::block
