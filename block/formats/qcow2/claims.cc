// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/claims.h"

namespace minivmm::block::qcow2 {

bool Claims::taken(const Shard& shard, const Claim& claim) noexcept {
  for (const Claim* other = shard.head; other != nullptr; other = other->next_) {
    if (other->group_ == claim.group_ && other->first_ < claim.end_ && claim.first_ < other->end_) {
      return true;
    }
  }
  return false;
}

Claims::Claim::Claim(Claims& claims, uint64_t group, uint64_t first, uint64_t count)
    : claims_(claims), group_(group), first_(first), end_(first + count) {
  Shard& shard = claims_.shard(group_);
  std::unique_lock lock(shard.mutex);
  while (taken(shard, *this)) shard.released.wait(lock, "an allocation of the same cluster");
  next_ = shard.head;
  if (next_ != nullptr) next_->prev_ = this;
  shard.head = this;
}

Claims::Claim::~Claim() {
  Shard& shard = claims_.shard(group_);
  const std::lock_guard lock(shard.mutex);
  if (prev_ != nullptr) {
    prev_->next_ = next_;
  } else {
    shard.head = next_;
  }
  if (next_ != nullptr) next_->prev_ = prev_;
  shard.released.notify_all();
}

}  // namespace minivmm::block::qcow2
