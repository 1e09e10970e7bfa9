// SPDX-License-Identifier: Apache-2.0
#include "base/stack_pool.h"

#include <sys/mman.h>

#include <new>

namespace minivmm::base {
namespace {

constexpr size_t kGuardSize = 4096;
// Enough for the queue depths that front ends allow; a burst beyond it maps and unmaps.
constexpr size_t kMaxIdle = 1024;

void unmap(Stack stack) noexcept { ::munmap(stack.bottom - kGuardSize, stack.size + kGuardSize); }

}  // namespace

StackPool::~StackPool() { trim(0); }

Stack StackPool::take() {
  if (!idle_.empty()) {
    const Stack stack = idle_.back();
    idle_.pop_back();
    return stack;
  }
  // give_back must not fail, so the room for idle stacks is made here.
  if (idle_.capacity() == 0) idle_.reserve(kMaxIdle);
  void* base = ::mmap(nullptr, kFiberStackSize + kGuardSize, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  char* bottom = static_cast<char*>(base) + kGuardSize;
  if (::mprotect(bottom, kFiberStackSize, PROT_READ | PROT_WRITE) != 0) {
    ::munmap(base, kFiberStackSize + kGuardSize);
    throw std::bad_alloc();
  }
  return {bottom, kFiberStackSize};
}

void StackPool::give_back(Stack stack) noexcept {
  if (idle_.size() == idle_.capacity()) {
    unmap(stack);
    return;
  }
  idle_.push_back(stack);
}

void StackPool::trim(size_t keep) noexcept {
  while (idle_.size() > keep) {
    unmap(idle_.back());
    idle_.pop_back();
  }
}

}  // namespace minivmm::base
