// SPDX-License-Identifier: Apache-2.0
// What a verifying load expects to read: each block's last written generation, from which its
// whole content follows. Used by one thread. A block has at most one request in flight, so that
// its content is never ambiguous.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace minivmm::bench {

class LoadModel {
 public:
  // `seed` tells this run's content from an older one's in the same blocks.
  LoadModel(std::uint64_t first_block, std::uint64_t blocks, std::size_t block_size,
            std::uint64_t seed);

  bool busy(std::uint64_t block) const { return busy_[index(block)]; }
  void set_busy(std::uint64_t block, bool busy) { busy_[index(block)] = busy; }
  bool written(std::uint64_t block) const { return generation_[index(block)] != 0; }

  // The next generation's content of a block, to be written.
  void fill_next(std::uint64_t block, char* data);
  // False: not what was last written. Blocks this run never wrote are not judged.
  bool check(std::uint64_t block, const char* data) const;

 private:
  std::size_t index(std::uint64_t block) const { return static_cast<std::size_t>(block - first_); }
  std::uint64_t word(std::uint64_t block, std::uint32_t generation, std::size_t i) const;

  std::uint64_t first_;
  std::size_t block_size_;
  std::uint64_t seed_;
  std::vector<std::uint32_t> generation_;
  std::vector<bool> busy_;
};

}  // namespace minivmm::bench
