// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"

namespace minivmm::block {

using base::Error;

namespace {

constexpr uint64_t kMaxSize = uint64_t{1} << 40;
constexpr uint64_t kPage = 4096;

}  // namespace

MemoryNode::MemoryNode(const NodeConfig& config, uint64_t size, uint64_t capacity)
    : Node(config.node_name, "memory", config.read_only) {
  if (std::max(size, capacity) > kMaxSize) throw Error(EINVAL, "memory: size: at most 1 TiB");
  // Room to grow, so that a resize never moves what requests are copying from.
  capacity_ = base::align_up(std::max<uint64_t>({size, capacity, 1}), kPage);
  void* data = ::mmap(nullptr, capacity_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    throw base::errno_error(errno, fmt::format("memory: cannot map {} bytes", capacity_));
  }
  data_ = static_cast<std::byte*>(data);
  set_size(size);
  set_limits({.discard_granularity = kPage, .can_discard = true, .can_write_zeroes = true});
}

MemoryNode::~MemoryNode() { ::munmap(data_, capacity_); }

template <typename Work>
void MemoryNode::for_each_stripe(uint64_t offset, uint64_t length, Work work) {
  for (uint64_t done = 0; done < length;) {
    const uint64_t at = offset + done;
    const uint64_t piece = std::min(length - done, kStripe - at % kStripe);
    work(at, piece, done);
    done += piece;
  }
}

void MemoryNode::driver_read(uint64_t offset, IoSpan to) {
  for_each_stripe(offset, to.bytes(), [&](uint64_t at, uint64_t n, uint64_t done) {
    const std::shared_lock lock(lock_of(at));
    base::copy_to(to, done, {data_ + at, n});
  });
}

void MemoryNode::driver_write(uint64_t offset, IoSpan from, WriteFlags) {
  if (offset + from.bytes() > capacity_) {
    throw Error(ENOSPC, fmt::format("{}: is full ({} bytes)", describe(), capacity_));
  }
  for_each_stripe(offset, from.bytes(), [&](uint64_t at, uint64_t n, uint64_t done) {
    const std::unique_lock lock(lock_of(at));
    base::copy_from(from, done, {data_ + at, n});
  });
  grow_size(offset + from.bytes());
}

void MemoryNode::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags) {
  if (offset + length > capacity_) {
    throw Error(ENOSPC, fmt::format("{}: is full ({} bytes)", describe(), capacity_));
  }
  for_each_stripe(offset, length, [&](uint64_t at, uint64_t n, uint64_t) {
    const std::unique_lock lock(lock_of(at));
    // Whole pages go back to the system, and come back as zeroes.
    const uint64_t first = std::min(base::align_up(at, kPage), at + n);
    const uint64_t last = std::max(base::align_down(at + n, kPage), first);
    std::memset(data_ + at, 0, first - at);
    // Refused for memory that is locked.
    if (last > first && ::madvise(data_ + first, last - first, MADV_DONTNEED) != 0) {
      std::memset(data_ + first, 0, last - first);
    }
    std::memset(data_ + last, 0, at + n - last);
  });
  grow_size(offset + length);
}

void MemoryNode::driver_discard(uint64_t offset, uint64_t length) {
  driver_write_zeroes(offset, length, {});
}

void MemoryNode::driver_truncate(uint64_t new_size) {
  if (new_size > capacity_) {
    throw Error(ENOSPC, fmt::format("{}: has room for {} bytes only", describe(), capacity_));
  }
  const uint64_t old_size = size();
  set_size(new_size);
  if (new_size < old_size) {
    driver_write_zeroes(new_size, old_size - new_size, {});
    set_size(new_size);
  }
}

std::shared_ptr<Node> open_memory(Opening&, const NodeConfig& config, Options& options) {
  const auto size = options.take_size("size");
  if (!size) throw Error(EINVAL, "memory: option 'size' is missing");
  return std::make_shared<MemoryNode>(config, *size);
}

}  // namespace minivmm::block
