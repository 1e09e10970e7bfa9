// SPDX-License-Identifier: Apache-2.0
// Buffers for clusters that are being compressed: those of the last ones are kept for the next.
// Aligned blocks of that size, taken and given back in turns, leave a heap several times as large
// as what is in use.
//
// Owned by the node. Any thread.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

#include "base/buffer.h"

namespace minivmm::block::qcow2 {

class ClusterBuffers {
 public:
  struct Pair {
    base::Buffer plain;
    base::Buffer packed;
  };

  // One pair, while it lives.
  class Lease {
   public:
    Lease(ClusterBuffers& owner, size_t cluster_size)
        : owner_(owner), pair_(owner.take(cluster_size)) {}
    ~Lease() { owner_.give(std::move(pair_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    base::Buffer& plain() { return pair_.plain; }
    base::Buffer& packed() { return pair_.packed; }

   private:
    ClusterBuffers& owner_;
    Pair pair_;
  };

 private:
  static constexpr size_t kKept = 1 << 20;  // bytes, at most

  Pair take(size_t size) {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        Pair out = std::move(free_.back());
        free_.pop_back();
        return out;
      }
    }
    return {base::Buffer(size), base::Buffer(size)};
  }
  void give(Pair pair) noexcept {
    const std::lock_guard lock(mutex_);
    if ((free_.size() + 1) * 2 * pair.plain.size() > kKept) return;
    try {
      free_.push_back(std::move(pair));
    } catch (const std::bad_alloc&) {
      // Then it is not kept.
    }
  }

  std::mutex mutex_;
  std::vector<Pair> free_;  // guarded by mutex_
};

}  // namespace minivmm::block::qcow2
