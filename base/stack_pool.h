// SPDX-License-Identifier: Apache-2.0
// Fiber stacks: mapped with a guard page below, reused last-in first-out, given back to the system
// when many lie idle. A pool belongs to one loop and its thread.
#pragma once

#include <cstddef>
#include <vector>

namespace minivmm::base {

// 64 KiB is enough for the deepest chain of nodes allowed (see block/graph/graph.h) with room to
// spare; ASan's redzones multiply frames.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t kFiberStackSize = 256 * 1024;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
inline constexpr size_t kFiberStackSize = 256 * 1024;
#else
inline constexpr size_t kFiberStackSize = 64 * 1024;
#endif
#else
inline constexpr size_t kFiberStackSize = 64 * 1024;
#endif

// The usable part of one stack, without its guard page.
struct Stack {
  char* bottom = nullptr;
  size_t size = 0;
  char* top() const noexcept { return bottom + size; }
};

class StackPool {
 public:
  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();

  // Throws std::bad_alloc: to a caller this is memory that is not there.
  Stack take();
  void give_back(Stack stack) noexcept;

  // Unmaps idle stacks beyond `keep`. The loop calls it now and then when it has nothing to do.
  void trim(size_t keep) noexcept;
  size_t idle() const noexcept { return idle_.size(); }

 private:
  std::vector<Stack> idle_;
};

}  // namespace minivmm::base
