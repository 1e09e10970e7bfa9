// SPDX-License-Identifier: Apache-2.0
#include "base/pages.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "base/checked.h"

namespace minivmm::base {
namespace {

constexpr size_t kPage = 4096;

size_t whole(size_t size) noexcept { return align_up<size_t>(size, kPage); }

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kHeap = true;  // its bounds are looked after
#else
constexpr bool kHeap = false;
#endif

bool on_heap(size_t size) noexcept { return kHeap || size < kPage; }

}  // namespace

Pages::Pages(size_t size) : size_(size) {
  void* data = nullptr;
  if (on_heap(size)) {
    data =
        size < kPage ? std::malloc(size == 0 ? 1 : size) : std::aligned_alloc(kPage, whole(size));
  } else {
    data = ::mmap(nullptr, whole(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) data = nullptr;
  }
  if (data == nullptr) throw std::bad_alloc();
  data_ = static_cast<std::byte*>(data);
}

Pages::~Pages() {
  if (on_heap(size_)) {
    std::free(data_);
  } else {
    ::munmap(data_, whole(size_));
  }
}

}  // namespace minivmm::base
