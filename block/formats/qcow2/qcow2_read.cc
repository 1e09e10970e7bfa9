// SPDX-License-Identifier: Apache-2.0
// Reading. The path through a chain of backing files recurses on the fiber's stack, a few frames a
// layer; what only some extents need (compressed data) is kept out of those frames.
#include <cerrno>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/pool.h"
#include "block/formats/qcow2/decompress.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/stored_blocks.h"
#include "block/graph/loan.h"

namespace minivmm::block {

using qcow2::ClusterKind;
using qcow2::Extent;

void Qcow2Node::driver_read(uint64_t offset, IoSpan to) {
  const base::Epoch::Pin pin(epoch_);
  for (uint64_t done = 0; done < to.bytes();) {
    const Extent extent = image_.map().lookup_long(offset + done, to.bytes() - done);
    base::IoList list;
    read_extent(extent, offset + done, base::slice(to, done, extent.length, list));
    done += extent.length;
  }
}

void Qcow2Node::read_extent(const Extent& extent, uint64_t offset, IoSpan to) {
  switch (extent.kind) {
    case ClusterKind::kData:
      image_.read_data({.guest = offset, .host = extent.host_offset}, to);
      return;
    case ClusterKind::kUnallocated:
      read_backing(offset, to);
      return;
    case ClusterKind::kCompressed:
      read_compressed(extent, offset, to);
      return;
    default:
      base::fill_zero(to, 0, to.bytes());
  }
}

void Qcow2Node::read_backing(uint64_t offset, IoSpan to) {
  if (backing_) {
    backing_->read(offset, to);  // past its end: zeroes
  } else {
    base::fill_zero(to, 0, to.bytes());
  }
}

void Qcow2Node::read_compressed(const Extent& extent, uint64_t guest_offset, IoSpan to) {
  const uint64_t cluster_size = geometry().cluster_size();
  base::Buffer packed(extent.compressed_bytes);
  base::Buffer plain(cluster_size);
  file().read(extent.host_offset, packed.io());
  const char* problem = base::Pool::work().run(
      [&] { return qcow2::decompress(header().compression, packed.span(), plain.span()); });
  if (problem != nullptr) {
    throw base::Error(
        EIO, fmt::format("{}: the compressed cluster at guest offset {:#x} (host {:#x}) cannot be "
                         "read: {}",
                         describe(), guest_offset - geometry().offset_in_cluster(guest_offset),
                         extent.host_offset, problem));
  }
  base::copy_to(to, 0,
                plain.span().subspan(geometry().offset_in_cluster(guest_offset), to.bytes()));
}

// Of one extent. Zeroes are not lent: what is made of them is no copy.
bool Qcow2Node::driver_lend(uint64_t offset, uint64_t length, Loan& to) noexcept {
  if (image_.encryption() != nullptr || !to.pin(base::Epoch::Pin(epoch_))) return false;
  const auto extent = image_.map().lookup_cached(offset, length);
  if (!extent || extent->length < length) return false;
  if (extent->kind == ClusterKind::kData) {
    return image_.data().lend(extent->host_offset, length, to);
  }
  return extent->kind == ClusterKind::kUnallocated && backing_ &&
         backing_->lend(offset, length, to);
}

void Qcow2Node::driver_copy_out(uint64_t offset, uint64_t length, const TakePiece& take) {
  const base::Error elsewhere(ENOTSUP, "copy range: is not stored as it reads");
  if (image_.encryption() != nullptr) throw elsewhere;
  const base::Epoch::Pin pin(epoch_);
  for (uint64_t done = 0; done < length;) {
    const Extent extent = image_.map().lookup_long(offset + done, length - done);
    if (extent.kind == ClusterKind::kData) {
      image_.data().copy_out(extent.host_offset, extent.length, take);
    } else if (extent.kind == ClusterKind::kUnallocated && backing_) {
      backing_->copy_out(offset + done, extent.length, take);
    } else {
      throw elsewhere;
    }
    done += extent.length;
  }
}

// Found out once: what is written later makes the file less sparse, and looking is never wrong.
bool Qcow2Node::data_may_be_holes() {
  SparseData known = sparse_data_.load(std::memory_order_relaxed);
  if (known == SparseData::kUnknown) {
    known = qcow2::counts_more_than_stored(image_.file()) ? SparseData::kYes : SparseData::kNo;
    sparse_data_.store(known, std::memory_order_relaxed);
  }
  return known == SparseData::kYes;
}

// `status` is of data at its host offset.
void Qcow2Node::look_into_file(BlockStatus& status) {
  const BlockStatus below = image_.data().block_status(*status.host_offset, status.length);
  status.length = below.length;
  status.zero = below.zero;
}

BlockStatus Qcow2Node::driver_block_status(uint64_t offset, uint64_t length) {
  const base::Epoch::Pin pin(epoch_);
  const Extent extent = image_.map().lookup_long(offset, length);
  BlockStatus out;
  out.length = extent.length;
  switch (extent.kind) {
    case ClusterKind::kUnallocated:
      if (!backing_) {
        out.zero = true;
        return out;
      }
      out = backing_->block_status(offset, extent.length);
      out.allocated = false;
      ++out.depth;
      return out;
    case ClusterKind::kData:
      out.data = true;
      // What lies there is not what the guest sees.
      if (image_.encryption() == nullptr) {
        out.host_offset = extent.host_offset;
        if (data_may_be_holes()) look_into_file(out);
      }
      break;
    case ClusterKind::kCompressed:
      out.data = true;
      out.compressed = true;
      break;
    case ClusterKind::kZeroAllocated:
      out.host_offset = extent.host_offset;
      out.zero = true;
      break;
    default:
      out.zero = true;
  }
  out.allocated = true;
  return out;
}

}  // namespace minivmm::block
