// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/buffer_pool.h"

namespace minivmm::nbd {

size_t BufferPool::class_of(size_t size) noexcept {
  return static_cast<size_t>(std::countr_zero(room_for(std::max(size, kSmallest)) / kSmallest));
}

base::Pages BufferPool::take(size_t size) {
  const size_t c = class_of(size);
  if (c >= kClasses) return base::Pages(size);
  auto& list = free_[c];
  if (list.empty()) {
    if (all_.bytes() > KeptBuffers::kAlways && all_.too_much()) {
      trim();
      all_.trim_all();
    }
    return base::Pages(kSmallest << c);
  }
  base::Pages out = std::move(list.back());
  list.pop_back();
  kept_ -= out.size();
  unused_ = std::min(unused_, kept_);
  count();
  return out;
}

void BufferPool::give_back(base::Pages buffer) noexcept {
  if (buffer.data() == nullptr || kept_ + buffer.size() > kMaxKept ||
      all_.bytes() + buffer.size() > KeptBuffers::kMost) {
    return;
  }
  const size_t c = class_of(buffer.size());
  if (c >= kClasses || buffer.size() != kSmallest << c) return;
  try {
    const size_t size = buffer.size();
    free_[c].push_back(std::move(buffer));
    kept_ += size;
    count();
  } catch (const std::bad_alloc&) {
    // No room in the list: the buffer is simply freed.
  }
}

void BufferPool::count() noexcept {
  if (kept_ >= counted_ + kStep) {
    all_.add(kept_ - counted_);
  } else if (kept_ + kStep <= counted_) {
    all_.remove(counted_ - kept_);
  } else {
    return;
  }
  counted_ = kept_;
}

void BufferPool::shrink() noexcept {
  if (unused_ > KeptBuffers::kAlways) {
    const size_t goal = kept_ - unused_;
    for (size_t c = kClasses; c-- > 0;) {
      while (!free_[c].empty() && kept_ >= goal + free_[c].back().size()) {
        kept_ -= free_[c].back().size();
        free_[c].pop_back();
      }
    }
    count();
  }
  unused_ = kept_;
}

void BufferPool::trim() noexcept {
  for (auto& list : free_) list.clear();
  kept_ = 0;
  unused_ = 0;
  all_.remove(counted_);
  counted_ = 0;
}

}  // namespace minivmm::nbd
