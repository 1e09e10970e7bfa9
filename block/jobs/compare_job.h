// SPDX-License-Identifier: Apache-2.0
// Compares two nodes: many extents in flight at once, on every loop of a group. What is zero on
// both sides is not read. A side that is shorter reads as zeroes past its end.
#pragma once

#include <string>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "base/buffer.h"
#include "base/loop_group.h"
#include "block/graph/edge.h"
#include "block/jobs/chain_status.h"
#include "block/jobs/extent_cursor.h"
#include "block/jobs/worker_group.h"

namespace minivmm::block {

struct Difference {
  enum class Kind { kContent, kStatus };
  Kind kind = Kind::kContent;
  // Of the first sector of 512 bytes that differs, counted from the disk's beginning or from where
  // the shorter side ends.
  uint64_t offset = 0;
};

class CompareJob {
 public:
  struct Side {
    Edge* disk;
    std::string name;  // in errors
    uint64_t size;
    // Its last byte's; `size` is in whole sectors.
    uint64_t end() const noexcept { return std::min(size, disk->size()); }
  };
  // `strict`: what is data, zero or not allocated must be so on both sides.
  CompareJob(Side first, Side second, bool strict);

  // Fiber of one of the loops; once. The lowest difference, whichever was found first; nothing if
  // there is none. Throws what went wrong, with the side and the offset; ECANCELED.
  std::optional<Difference> run(base::LoopGroup& loops, unsigned requests);

  // Any thread, also from a signal handler.
  void cancel() noexcept {
    cancelled_.store(true, std::memory_order_release);
    workers_.stop();
  }
  // Bytes that have been dealt with, of the longer side. Any thread.
  uint64_t done() const noexcept { return done_.load(std::memory_order_relaxed); }
  uint64_t size() const noexcept { return pair_.size(); }

 private:
  // Both sides as one source: data where either has any.
  class Pair final : public CopySource {
   public:
    Pair(Side first, Side second, bool strict);
    uint64_t size() const noexcept override { return size_; }
    SourceExtent extent(uint64_t offset, uint64_t length) override;
    // Not used: a comparison reads the sides one by one.
    void read(uint64_t offset, IoSpan to) override;
    void copy_to(Edge& target, uint64_t target_offset, uint64_t offset, uint64_t length) override;

    void read_side(size_t side, uint64_t offset, IoSpan to);
    // Where strict comparison found that the sides are stored differently; the extents end there.
    uint64_t status_differs_at() const noexcept { return differs_at_.load(); }

    // Where the shorter side ends.
    uint64_t common() const noexcept { return std::min(sides_[0].end(), sides_[1].end()); }

   private:
    ChainStatus status(size_t side, uint64_t offset, uint64_t length);

    Side sides_[2];
    const bool strict_;
    const uint64_t size_;
    const LayerChain chains_[2];
    std::atomic<uint64_t> differs_at_{~uint64_t{0}};
  };

  void work();
  void compare(const Batch& batch, base::Buffer& first, base::Buffer& second);
  void differs(uint64_t offset) noexcept;

  Pair pair_;
  ExtentCursor cursor_;
  WorkerGroup workers_;
  std::atomic<bool> cancelled_{false};
  std::atomic<uint64_t> done_{0};
  std::atomic<uint64_t> content_differs_at_{~uint64_t{0}};
};

}  // namespace minivmm::block
