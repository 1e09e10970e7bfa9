// SPDX-License-Identifier: Apache-2.0
// What the n-th request of a stress job does: a pure function of the parameters and n, so that a
// checker outside the guest can say which requests touched a block without having seen them. Used
// by the guest and by the tests on the host.
#pragma once

#include <cstdint>

#include "images/probe/stamp.h"

namespace minivmm::probe {

struct StressParameters {
  uint64_t seed = 1;
  uint64_t offset = 0;         // bytes: where block 0 lies
  uint64_t blocks = 0;         // in the range
  uint32_t block_size = 4096;  // bytes
  uint32_t max_blocks = 8;     // of one request
  bool zeroes = false;         // some requests are WRITE_ZEROES
  bool discards = false;       // some are DISCARD
};

enum class StressOp { kWrite, kRead, kFlush, kZero, kDiscard };

struct StressRequest {
  StressOp op;
  uint64_t block;  // first one, counted from the start of the range
  uint32_t count;  // blocks
};

// `sequence` counts from 1. The blocks lie inside the range.
constexpr StressRequest stress_request(const StressParameters& p, uint64_t sequence) noexcept {
  const uint64_t where = mix64(p.seed ^ mix64(sequence));
  const uint64_t what = mix64(where);
  const uint64_t limit = p.max_blocks < p.blocks ? p.max_blocks : p.blocks;
  StressRequest out{StressOp::kWrite, 0, static_cast<uint32_t>((what >> 8) % limit + 1)};
  out.block = where % (p.blocks - out.count + 1);
  const uint64_t kind = what & 63;
  if (kind == 0) out.op = StressOp::kFlush;
  if (kind >= 1 && kind <= 16) out.op = StressOp::kRead;
  if (kind >= 17 && kind <= 20 && p.zeroes) out.op = StressOp::kZero;
  if (kind >= 21 && kind <= 23 && p.discards) out.op = StressOp::kDiscard;
  return out;
}

}  // namespace minivmm::probe
