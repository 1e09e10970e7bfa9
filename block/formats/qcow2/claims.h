// SPDX-License-Identifier: Apache-2.0
// What is being allocated or dropped right now. Whoever changes L2 entries claims the guest
// clusters first; a second one that wants the same waits and then looks again. Different clusters
// never wait for each other, and in-place reads and writes claim nothing.
//
// Any loop. A claim lives on the stack of the fiber that does the work, across its I/O.
#pragma once

#include <cstdint>
#include <mutex>

#include "base/wait_queue.h"

namespace minivmm::block::qcow2 {

class Claims {
 public:
  Claims() = default;
  Claims(const Claims&) = delete;
  Claims& operator=(const Claims&) = delete;

  class Claim {
   public:
    // Claims [first, first + count) once nobody else holds any of it. Claims that may overlap have
    // the same `group`.
    Claim(Claims& claims, uint64_t group, uint64_t first, uint64_t count);
    ~Claim();
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;

   private:
    friend class Claims;
    Claims& claims_;
    const uint64_t group_;
    const uint64_t first_;
    const uint64_t end_;
    Claim* prev_ = nullptr;
    Claim* next_ = nullptr;
  };

 private:
  struct alignas(64) Shard {
    std::mutex mutex;
    base::WaitQueue released;
    Claim* head = nullptr;
  };
  static constexpr uint64_t kShards = 16;
  Shard& shard(uint64_t group) noexcept { return shards_[group % kShards]; }
  static bool taken(const Shard& shard, const Claim& claim) noexcept;

  Shard shards_[kShards];
};

}  // namespace minivmm::block::qcow2
