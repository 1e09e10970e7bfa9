// SPDX-License-Identifier: Apache-2.0
#include "fuse/request_buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "base/error.h"

namespace minivmm::fuse {

RequestBuffer::RequestBuffer() {
  void* const memory = ::mmap(nullptr, kSize, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw base::errno_error(errno, "FUSE: cannot map a request buffer");
  // Most requests touch two pages; a huge page for each buffer would be waste.
  (void)::madvise(memory, kSize, MADV_NOHUGEPAGE);
  memory_ = static_cast<std::byte*>(memory);
}

RequestBuffer::~RequestBuffer() { ::munmap(memory_, kSize); }

void RequestBuffer::release_memory() noexcept { (void)::madvise(memory_, kSize, MADV_DONTNEED); }

BufferPool::BufferPool() { give_back(take()); }

RequestBuffer* BufferPool::take() {
  if (idle_.empty()) {
    // Room first: give_back must not fail.
    idle_.reserve(all_.size() + 1);
    all_.push_back(std::make_unique<RequestBuffer>());
    return all_.back().get();
  }
  RequestBuffer* const buffer = idle_.back();
  idle_.pop_back();
  cold_ = std::min(cold_, idle_.size());
  return buffer;
}

void BufferPool::give_back(RequestBuffer* buffer) noexcept { idle_.push_back(buffer); }

void BufferPool::trim(size_t keep) noexcept {
  while (cold_ + keep < idle_.size()) idle_[cold_++]->release_memory();
}

}  // namespace minivmm::fuse
