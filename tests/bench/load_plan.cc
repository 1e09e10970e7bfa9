// SPDX-License-Identifier: Apache-2.0
#include "load_plan.h"

#include <cerrno>

#include "base/error.h"

namespace minivmm::bench {

LoadKind parse_load_kind(const std::string& name) {
  if (name == "read") return LoadKind::kRead;
  if (name == "write") return LoadKind::kWrite;
  if (name == "randread") return LoadKind::kRandRead;
  if (name == "randwrite") return LoadKind::kRandWrite;
  if (name == "randrw") return LoadKind::kRandRw;
  throw base::Error(EINVAL, "--rw=" + name + " is none of read write randread randwrite randrw");
}

// splitmix64
std::uint64_t LoadPlan::random() {
  state_ += 0x9e3779b97f4a7c15U;
  std::uint64_t v = state_;
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9U;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebU;
  return v ^ (v >> 31);
}

std::optional<LoadOp> LoadPlan::next() {
  if (recheck_) return next_recheck();
  constexpr unsigned kTries = 16;
  for (unsigned i = 0; i < kTries; ++i) {
    LoadOp op;
    const bool in_order = kind_ == LoadKind::kRead || kind_ == LoadKind::kWrite;
    const std::uint64_t pick = random();
    op.block = first_ + (in_order ? position_++ % blocks_ : (pick >> 1) % blocks_);
    op.write = kind_ == LoadKind::kWrite || kind_ == LoadKind::kRandWrite ||
               (kind_ == LoadKind::kRandRw && (pick & 1) != 0);
    if (model_ == nullptr) return op;
    if (model_->busy(op.block)) continue;
    model_->set_busy(op.block, true);
    return op;
  }
  return std::nullopt;
}

std::optional<LoadOp> LoadPlan::next_recheck() {
  while (position_ < blocks_ && !model_->written(first_ + position_)) ++position_;
  if (position_ == blocks_) return std::nullopt;
  const LoadOp op{false, first_ + position_++};
  model_->set_busy(op.block, true);
  return op;
}

}  // namespace minivmm::bench
