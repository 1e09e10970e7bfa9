// SPDX-License-Identifier: Apache-2.0
// Which block a load touches next: a connection's share of the range, in order or at random.
#pragma once

#include <string>

#include <cstdint>
#include <optional>

#include "load_model.h"

namespace minivmm::bench {

enum class LoadKind { kRead, kWrite, kRandRead, kRandWrite, kRandRw };

// Throws base::Error (EINVAL) for an unknown name.
LoadKind parse_load_kind(const std::string& name);

struct LoadOp {
  bool write = false;
  std::uint64_t block = 0;
};

class LoadPlan {
 public:
  // Blocks [first, first + blocks). `model` may be null; else it is told which blocks are busy.
  LoadPlan(LoadKind kind, std::uint64_t first, std::uint64_t blocks, std::uint64_t seed,
           LoadModel* model)
      : kind_(kind), first_(first), blocks_(blocks), state_(seed * 2 + 1), model_(model) {}

  // Nothing: no block is free just now, or the re-check has ended.
  std::optional<LoadOp> next();

  // From now on: read each block that was written, once.
  void begin_recheck() {
    recheck_ = true;
    position_ = 0;
  }

 private:
  std::uint64_t random();
  std::optional<LoadOp> next_recheck();

  LoadKind kind_;
  std::uint64_t first_;
  std::uint64_t blocks_;
  std::uint64_t state_;
  LoadModel* model_;
  std::uint64_t position_ = 0;
  bool recheck_ = false;
};

}  // namespace minivmm::bench
