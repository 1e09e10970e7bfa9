// SPDX-License-Identifier: Apache-2.0
// Room for compressed clusters, by bytes: one after the other in a host cluster that is kept open,
// and over its end where the next free one follows it.
//
// Each compressed entry holds a reference on every host cluster it touches. The open cluster has
// one more, of this class, so that it is not given to others while there is room in it; the last
// entry that goes into it takes that one over. After a crash the open cluster has leaked at worst.
//
// Owned by Image. Any loop, on fibers.
#pragma once

#include <cstdint>

#include "base/sync.h"
#include "block/formats/qcow2/allocator.h"
#include "block/formats/qcow2/refcounts.h"

namespace minivmm::block::qcow2 {

class ByteAllocator {
 public:
  ByteAllocator(ImageFile& image, Allocator& allocator, Refcounts& refcounts);

  // Room for `bytes`, less than a cluster; returns its offset in the file. The clusters it touches
  // have a reference more. Throws ENOSPC and such with nothing taken.
  uint64_t take(uint64_t bytes);
  // Gives the open cluster up. Before the last commit.
  void close();

 private:
  uint64_t room() const noexcept;
  void advance(uint64_t bytes);

  ImageFile& image_;
  Allocator& allocator_;
  Refcounts& refcounts_;
  base::FiberMutex mutex_;
  uint64_t next_ = 0;  // guarded by mutex_: the next free byte; on a cluster's border: none is open
};

}  // namespace minivmm::block::qcow2
