// SPDX-License-Identifier: Apache-2.0
// Prepares an overlay for another backing file: what it takes from the old one, and would be
// different with the new one, is written into it. What it shows does not change.
//
// As with a copy, many extents are in flight on every loop. After an error the overlay holds more
// of its own than before, and still shows the same over its old backing file. Nothing is flushed.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <optional>

#include "base/buffer.h"
#include "base/loop_group.h"
#include "block/graph/edge.h"
#include "block/jobs/chain_status.h"
#include "block/jobs/copy_source.h"
#include "block/jobs/extent_cursor.h"
#include "block/jobs/worker_group.h"

namespace minivmm::block {

struct RebaseNodes {
  Edge* overlay = nullptr;      // over its old backing file; written to
  Edge* old_backing = nullptr;  // the edge below it; null: it has none
  Edge* new_backing = nullptr;  // null: it is to have none
  // The layer of the old chain (0: the old backing file itself) that is the new backing file, if
  // it is there: what comes from it or from below it is the same in both.
  std::optional<uint32_t> common = std::nullopt;
};

class RebaseJob {
 public:
  // `name` is the overlay's in errors. The nodes outlive the job.
  RebaseJob(RebaseNodes nodes, std::string name);

  // Fiber of one of the loops; once. Throws ECANCELED after cancel().
  void run(base::LoopGroup& loops);
  // Any thread, also from a signal handler.
  void cancel() noexcept {
    cancelled_.store(true, std::memory_order_release);
    workers_.stop();
  }
  // Bytes of the overlay's disk. Any thread.
  uint64_t done() const noexcept { return done_.load(std::memory_order_relaxed); }
  uint64_t size() const noexcept { return inherited_.size(); }

 private:
  // The overlay's disk: data where old and new backing file must be compared.
  class Inherited final : public CopySource {
   public:
    explicit Inherited(const RebaseNodes& nodes);
    uint64_t size() const noexcept override { return nodes_.overlay->size(); }
    SourceExtent extent(uint64_t offset, uint64_t length) override;
    // Of the old backing file; past its end zeroes.
    void read(uint64_t offset, IoSpan to) override;
    void copy_to(Edge& target, uint64_t target_offset, uint64_t offset, uint64_t length) override;

   private:
    const RebaseNodes nodes_;
    std::optional<LayerChain> old_chain_;
  };

  void work();
  void compare(const SourceExtent& extent, base::Buffer& old_data, base::Buffer& new_data);
  void keep(uint64_t offset, std::span<std::byte> data);

  const RebaseNodes nodes_;
  const std::string name_;
  Inherited inherited_;
  ExtentCursor cursor_;
  WorkerGroup workers_;
  std::atomic<bool> cancelled_{false};
  std::atomic<uint64_t> done_{0};
};

}  // namespace minivmm::block
