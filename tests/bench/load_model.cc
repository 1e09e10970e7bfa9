// SPDX-License-Identifier: Apache-2.0
#include "load_model.h"

#include <cstring>

namespace minivmm::bench {
namespace {

constexpr std::size_t kWord = sizeof(std::uint64_t);

std::uint64_t mix(std::uint64_t v) {
  v ^= v >> 33;
  v *= 0xff51afd7ed558ccdU;
  v ^= v >> 33;
  v *= 0xc4ceb9fe1a85ec53U;
  return v ^ (v >> 33);
}

}  // namespace

LoadModel::LoadModel(std::uint64_t first_block, std::uint64_t blocks, std::size_t block_size,
                     std::uint64_t seed)
    : first_(first_block),
      block_size_(block_size),
      seed_(mix(seed + 1)),
      generation_(blocks),
      busy_(blocks) {}

// Every word tells its block, its place and its generation: a torn, misplaced or stale one shows.
std::uint64_t LoadModel::word(std::uint64_t block, std::uint32_t generation, std::size_t i) const {
  return (seed_ ^ mix((block << 24) ^ generation)) + i * 0x9e3779b97f4a7c15U;
}

void LoadModel::fill_next(std::uint64_t block, char* data) {
  const std::uint32_t generation = ++generation_[index(block)];
  for (std::size_t i = 0; i < block_size_ / kWord; ++i) {
    const std::uint64_t w = word(block, generation, i);
    std::memcpy(data + i * kWord, &w, kWord);
  }
}

bool LoadModel::check(std::uint64_t block, const char* data) const {
  const std::uint32_t generation = generation_[index(block)];
  if (generation == 0) return true;
  for (std::size_t i = 0; i < block_size_ / kWord; ++i) {
    const std::uint64_t w = word(block, generation, i);
    if (std::memcmp(data + i * kWord, &w, kWord) != 0) return false;
  }
  return true;
}

}  // namespace minivmm::bench
