// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/byte_allocator.h"

#include <utility>

namespace minivmm::block::qcow2 {

ByteAllocator::ByteAllocator(ImageFile& image, Allocator& allocator, Refcounts& refcounts)
    : image_(image), allocator_(allocator), refcounts_(refcounts) {}

// In the open cluster.
uint64_t ByteAllocator::room() const noexcept {
  const Geometry& g = image_.geometry();
  const uint64_t used = g.offset_in_cluster(next_);
  return used == 0 ? 0 : g.cluster_size() - used;
}

uint64_t ByteAllocator::take(uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  const Geometry& g = image_.geometry();
  const uint64_t left = room();
  if (bytes <= left) {
    const uint64_t out = next_;
    advance(bytes);
    return out;
  }
  const uint64_t fresh = allocator_.allocate(1).offset;
  if (left != 0 && fresh == next_ + left) {
    // The entry takes this class's reference on the cluster that is full now.
    const uint64_t out = next_;
    next_ = fresh;
    advance(bytes - left);
    return out;
  }
  if (left != 0) {
    const uint64_t old = next_ >> g.cluster_bits;
    next_ = 0;
    if (refcounts_.lower(old) == 0) allocator_.add_free(old, 1);
  }
  next_ = fresh;
  advance(bytes);
  return fresh;
}

// An entry takes `bytes` of the cluster in which next_ lies; this class has a reference on it,
// which the entry gets if the cluster is full with it or its refcount cannot go higher.
void ByteAllocator::advance(uint64_t bytes) {
  const Geometry& g = image_.geometry();
  const uint64_t cluster = next_ >> g.cluster_bits;
  const bool full = g.offset_in_cluster(next_) + bytes == g.cluster_size();
  if (!full && refcounts_.raise(cluster, 1)) {
    next_ += bytes;
  } else {
    next_ = 0;
  }
}

void ByteAllocator::close() {
  const std::lock_guard lock(mutex_);
  if (room() == 0) return;
  const uint64_t cluster = std::exchange(next_, 0) >> image_.geometry().cluster_bits;
  if (refcounts_.lower(cluster) == 0) allocator_.add_free(cluster, 1);
}

}  // namespace minivmm::block::qcow2
