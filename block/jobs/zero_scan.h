// SPDX-License-Identifier: Apache-2.0
// Where a buffer is zero and where it holds data: what makes a copy sparse. Pure; any thread. The
// comparison runs on the widest vector instructions that the CPU has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace minivmm::block {

// How fine runs of zeroes are looked for.
class ZeroGrain {
 public:
  // `bytes` of nothing but zeroes are worth a hole; 0: none are.
  explicit ZeroGrain(uint64_t bytes) noexcept;

  bool enabled() const noexcept { return least_ != 0; }
  // A power of two: runs begin and end at its multiples.
  size_t block() const noexcept { return block_; }
  size_t least() const noexcept { return least_; }

 private:
  size_t block_ = 1;
  size_t least_ = 0;
};

struct ContentRun {
  size_t length = 0;
  bool zero = false;
};

// The run that `bytes` begin with. Runs of zeroes shorter than the grain's count as data, and so do
// those that do not cover its blocks; the last block of `bytes` may be short. `bytes` not empty.
ContentRun first_run(std::span<const std::byte> bytes, const ZeroGrain& grain) noexcept;

// True if every byte is zero.
bool all_zero(std::span<const std::byte> bytes) noexcept;

// For tests: the same by each of the implementations that this CPU can run.
using ZeroTest = bool (*)(const std::byte* data, size_t length) noexcept;
std::span<const ZeroTest> zero_tests() noexcept;

}  // namespace minivmm::block
