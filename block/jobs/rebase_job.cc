// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/rebase_job.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <fmt/core.h>

#include "base/error.h"
#include "block/jobs/zero_scan.h"

namespace minivmm::block {

using base::Error;

namespace {

constexpr uint64_t kRequest = 512 * 1024;
// What is compared and written as a whole; small overlay clusters stay their own.
constexpr uint64_t kUnit = 64 * 1024;

// A node's own status, or zero where there is no node or the range is past its end.
BlockStatus status_of(Edge* disk, uint64_t offset, uint64_t length) {
  if (disk == nullptr || offset >= disk->size()) return {.length = length, .zero = true};
  return disk->block_status(offset, std::min(length, disk->size() - offset));
}

void read_or_zero(Edge* disk, uint64_t offset, IoSpan to) {
  if (disk == nullptr) {
    base::fill_zero(to, 0, to.bytes());
  } else {
    disk->read(offset, to);  // past its end: zeroes
  }
}

}  // namespace

RebaseJob::Inherited::Inherited(const RebaseNodes& nodes) : nodes_(nodes) {
  if (nodes.old_backing != nullptr) old_chain_.emplace(*nodes.old_backing);
}

SourceExtent RebaseJob::Inherited::extent(uint64_t offset, uint64_t length) {
  const BlockStatus own = nodes_.overlay->block_status(offset, length);
  if (own.allocated) return {offset, own.length, ExtentKind::kBelow};
  length = own.length;
  bool old_zero = true;
  if (old_chain_ && offset < nodes_.old_backing->size()) {
    const ChainStatus old =
        old_chain_->status(offset, std::min(length, nodes_.old_backing->size() - offset));
    length = old.length;
    old_zero = old.zero;
    if (nodes_.common && old.depth >= *nodes_.common) {
      return {offset, length, ExtentKind::kBelow};
    }
  }
  const BlockStatus now = status_of(nodes_.new_backing, offset, length);
  const bool same = old_zero && now.zero;
  return {offset, now.length, same ? ExtentKind::kBelow : ExtentKind::kData};
}

void RebaseJob::Inherited::read(uint64_t offset, IoSpan to) {
  read_or_zero(nodes_.old_backing, offset, to);
}

void RebaseJob::Inherited::copy_to(Edge&, uint64_t, uint64_t, uint64_t) {
  throw Error(ENOTSUP, "copy range: not of a backing file");
}

RebaseJob::RebaseJob(RebaseNodes nodes, std::string name)
    : nodes_(nodes), name_(std::move(name)), inherited_(nodes), cursor_(inherited_, kRequest) {}

void RebaseJob::run(base::LoopGroup& loops) {
  workers_.run(loops, 2 * static_cast<unsigned>(loops.size()), [this] { work(); });
  if (cancelled_.load(std::memory_order_acquire)) throw Error(ECANCELED, "the rebase was stopped");
}

void RebaseJob::work() {
  base::Buffer old_data(kRequest);
  base::Buffer new_data(kRequest);
  Batch batch;
  while (!workers_.stopped()) {
    try {
      if (!cursor_.next(batch)) return;
      for (const SourceExtent& extent : batch.extents) {
        if (extent.kind == ExtentKind::kData) compare(extent, old_data, new_data);
      }
    } catch (...) {
      workers_.failed(batch.offset);
      return;
    }
    done_.fetch_add(batch.length, std::memory_order_relaxed);
  }
}

void RebaseJob::compare(const SourceExtent& extent, base::Buffer& old_data,
                        base::Buffer& new_data) {
  const auto was = old_data.span().first(extent.length);
  const auto will_be = new_data.span().first(extent.length);
  try {
    inherited_.read(extent.offset, base::SingleBuffer(was));
    read_or_zero(nodes_.new_backing, extent.offset, base::SingleBuffer(will_be));
  } catch (Error& e) {
    e.prepend(fmt::format("error while reading from a backing file of {} at byte {}", name_,
                          extent.offset));
    throw;
  }
  for (uint64_t done = 0; done < extent.length;) {
    // Units of the disk, not of the request.
    const uint64_t unit_end = (extent.offset + done) / kUnit * kUnit + kUnit - extent.offset;
    const uint64_t now = std::min(unit_end, extent.length) - done;
    if (std::memcmp(was.data() + done, will_be.data() + done, now) != 0) {
      keep(extent.offset + done, was.subspan(done, now));
    }
    done += now;
  }
}

void RebaseJob::keep(uint64_t offset, std::span<std::byte> data) {
  try {
    if (all_zero(data)) {
      nodes_.overlay->write_zeroes(offset, data.size());
    } else {
      nodes_.overlay->write(offset, base::SingleBuffer(data));
    }
  } catch (Error& e) {
    e.prepend(fmt::format("error while writing at byte {} of {}", offset, name_));
    throw;
  }
}

}  // namespace minivmm::block
