// SPDX-License-Identifier: Apache-2.0
// Copies a source onto a node: many extents in flight at once, on every loop of a group. Holes are
// not read, runs of zeroes are not written, and what both sides can copy by themselves does not
// pass through this process.
//
// Requests to the target are in no order. After an error or a cancellation the content of the
// target is a mixture; the caller says so, or removes it. Nothing is flushed: that is the caller's,
// too.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <functional>

#include "base/buffer.h"
#include "base/error.h"
#include "base/loop_group.h"
#include "block/graph/edge.h"
#include "block/jobs/copy_source.h"
#include "block/jobs/extent_cursor.h"
#include "block/jobs/worker_group.h"
#include "block/jobs/zero_scan.h"

namespace minivmm::block {

// Bytes of data a request, unless the caller knows better. Measured: from 1 MiB on a buffered write
// goes through the ring and overlaps with the next read; larger ones gain nothing.
inline constexpr uint64_t kCopyRequest = 1024 * 1024;

struct CopyOptions {
  uint64_t request = kCopyRequest;  // a power of two
  unsigned requests = 0;            // in flight; 0: two a loop
  uint64_t target_offset = 0;
  // Zeroes in data that are worth a hole; 0: everything is written, also what is a hole already.
  uint64_t zero_bytes = 4096;
  // What is not written reads as zeroes.
  bool target_is_zero = false;
  // Tried first, in whole `copy_unit`s (a power of two); where the nodes cannot, data is read and
  // written.
  bool copy_range = false;
  uint64_t copy_unit = 1;
  // Stored compressed, in units of so many bytes; 0: plainly.
  uint64_t compressed_cluster = 0;
  // Bytes of data a second; 0: no limit.
  uint64_t rate = 0;
  // Called for each sector of 512 bytes that cannot be read, on a fiber of any loop; returns true
  // to go on with zeroes in its place.
  std::function<bool(uint64_t offset, uint64_t length, const base::Error&)> tolerate = nullptr;
};

class CopyJob {
 public:
  // Both outlive the job. `from` and `to` name them in errors.
  CopyJob(CopySource& source, std::string from, Edge& target, std::string to, CopyOptions options);

  // Fiber of one of the loops; once. Throws what went wrong, with the side and the offset;
  // ECANCELED after cancel().
  void run(base::LoopGroup& loops);

  // Any thread, also from a signal handler. What is in flight is waited for.
  void cancel() noexcept {
    cancelled_.store(true, std::memory_order_release);
    workers_.stop();
  }

  // Any thread: bytes of data that have been copied, and of the source that have been dealt with.
  uint64_t data_done() const noexcept { return data_done_.load(std::memory_order_relaxed); }
  uint64_t done() const noexcept { return done_.load(std::memory_order_relaxed); }

 private:
  void work();
  void copy(const Batch& batch, base::Buffer& buffer);
  void copy_extent(const SourceExtent& extent, base::Buffer& buffer);
  bool copy_inside(const SourceExtent& extent);
  void compress_extent(const SourceExtent& extent, base::Buffer& buffer);
  void read(uint64_t offset, std::span<std::byte> to);
  void read_sectors(uint64_t offset, std::span<std::byte> to);
  [[noreturn]] void read_failed(uint64_t offset, base::Error& error) const;
  void write(uint64_t offset, std::span<std::byte> data);
  void zero(uint64_t offset, uint64_t length);
  void fill_with_zeroes(const SourceExtent& extent, base::Buffer& buffer);
  void pace(uint64_t bytes);
  template <typename Request>
  void on_target(uint64_t offset, Request&& request);

  CopySource& source_;
  const std::string from_;
  Edge& target_;
  const std::string to_;
  const CopyOptions options_;
  const ZeroGrain grain_;
  ExtentCursor cursor_;
  WorkerGroup workers_;
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> try_copy_range_;
  std::atomic<bool> copied_inside_{false};
  std::atomic<uint64_t> done_{0};
  std::atomic<uint64_t> data_done_{0};
  base::FiberMutex pacing_;
  base::Clock::time_point next_at_{};  // guarded by pacing_
};

}  // namespace minivmm::block
