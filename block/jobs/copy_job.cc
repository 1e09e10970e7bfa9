// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/copy_job.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "base/io.h"

namespace minivmm::block {

using base::Error;

namespace {

// Extents begin and end at its multiples.
uint64_t extent_unit(const CopyOptions& options) {
  if (options.compressed_cluster != 0) return options.compressed_cluster;
  return options.copy_range ? options.copy_unit : 1;
}

uint64_t buffer_bytes(const CopyOptions& options) {
  return std::max(options.request, extent_unit(options));
}

}  // namespace

CopyJob::CopyJob(CopySource& source, std::string from, Edge& target, std::string to,
                 CopyOptions options)
    : source_(source),
      from_(std::move(from)),
      target_(target),
      to_(std::move(to)),
      options_(std::move(options)),
      grain_(options_.zero_bytes),
      cursor_(source, buffer_bytes(options_), extent_unit(options_)),
      try_copy_range_(options_.copy_range) {}

void CopyJob::run(base::LoopGroup& loops) {
  const auto all = static_cast<unsigned>(loops.size());
  workers_.run(loops, options_.requests != 0 ? options_.requests : 2 * all, [this] { work(); });
  if (cancelled_.load(std::memory_order_acquire)) throw Error(ECANCELED, "the copy was stopped");
}

void CopyJob::work() {
  base::Buffer buffer(buffer_bytes(options_));
  Batch batch;
  while (!workers_.stopped()) {
    try {
      if (!cursor_.next(batch)) return;
      copy(batch, buffer);
    } catch (...) {
      workers_.failed(batch.offset);
      return;
    }
    done_.fetch_add(batch.length, std::memory_order_relaxed);
  }
}

void CopyJob::copy(const Batch& batch, base::Buffer& buffer) {
  for (const SourceExtent& extent : batch.extents) {
    switch (extent.kind) {
      case ExtentKind::kBelow:
        break;
      case ExtentKind::kZero:
        if (!grain_.enabled()) {
          fill_with_zeroes(extent, buffer);
        } else if (!options_.target_is_zero) {
          zero(extent.offset, extent.length);
        }
        break;
      case ExtentKind::kData:
        if (options_.rate != 0) pace(extent.length);
        if (options_.compressed_cluster != 0) {
          compress_extent(extent, buffer);
        } else if (!copy_inside(extent)) {
          copy_extent(extent, buffer);
        }
        data_done_.fetch_add(extent.length, std::memory_order_relaxed);
        break;
    }
  }
}

void CopyJob::copy_extent(const SourceExtent& extent, base::Buffer& buffer) {
  const std::span<std::byte> data = buffer.span().first(extent.length);
  read(extent.offset, data);
  for (size_t done = 0; done < data.size();) {
    const ContentRun run = first_run(data.subspan(done), grain_);
    if (!run.zero) {
      write(extent.offset + done, data.subspan(done, run.length));
    } else if (!options_.target_is_zero) {
      zero(extent.offset + done, run.length);
    }
    done += run.length;
  }
}

// False: not possible between these nodes.
bool CopyJob::copy_inside(const SourceExtent& extent) {
  if (!try_copy_range_.load(std::memory_order_relaxed)) return false;
  try {
    source_.copy_to(target_, options_.target_offset + extent.offset, extent.offset, extent.length);
    copied_inside_.store(true, std::memory_order_relaxed);
    return true;
  } catch (const Error& e) {
    if (e.err() != ENOTSUP) throw;
  }
  // Where nothing could be copied, nothing will be; otherwise it is this extent (a compressed
  // cluster, one that is data in part).
  if (!copied_inside_.load(std::memory_order_relaxed)) {
    try_copy_range_.store(false, std::memory_order_relaxed);
  }
  return false;
}

void CopyJob::compress_extent(const SourceExtent& extent, base::Buffer& buffer) {
  const std::span<std::byte> data = buffer.span().first(extent.length);
  read(extent.offset, data);
  for (uint64_t done = 0; done < data.size();) {
    const uint64_t now = std::min<uint64_t>(options_.compressed_cluster, data.size() - done);
    const std::span<std::byte> cluster = data.subspan(done, now);
    if (!grain_.enabled() || !all_zero(cluster)) {
      on_target(extent.offset + done,
                [&](uint64_t at) { target_.write_compressed(at, base::SingleBuffer(cluster)); });
    } else if (!options_.target_is_zero) {
      zero(extent.offset + done, now);
    }
    done += now;
  }
}

void CopyJob::read_failed(uint64_t offset, Error& error) const {
  error.prepend(fmt::format("error while reading at byte {} of {}", offset, from_));
  throw error;
}

void CopyJob::read(uint64_t offset, std::span<std::byte> to) {
  try {
    source_.read(offset, base::SingleBuffer(to));
    return;
  } catch (Error& e) {
    if (!options_.tolerate) read_failed(offset, e);
  }
  // What is around the bad sectors is to be had all the same.
  read_sectors(offset, to);
}

void CopyJob::read_sectors(uint64_t offset, std::span<std::byte> to) {
  constexpr size_t kSector = 512;
  for (size_t done = 0; done < to.size() && !workers_.stopped();) {
    const auto sector = to.subspan(done, std::min(kSector, to.size() - done));
    try {
      source_.read(offset + done, base::SingleBuffer(sector));
    } catch (Error& e) {
      if (!options_.tolerate(offset + done, sector.size(), e)) read_failed(offset + done, e);
      std::fill(sector.begin(), sector.end(), std::byte{0});
    }
    done += sector.size();
  }
}

// The request, with where it failed.
template <typename Request>
void CopyJob::on_target(uint64_t offset, Request&& request) {
  const uint64_t at = options_.target_offset + offset;
  try {
    request(at);
  } catch (Error& e) {
    e.prepend(fmt::format("error while writing at byte {} of {}", at, to_));
    throw;
  }
}

void CopyJob::write(uint64_t offset, std::span<std::byte> data) {
  on_target(offset, [&](uint64_t at) { target_.write(at, base::SingleBuffer(data)); });
}

void CopyJob::zero(uint64_t offset, uint64_t length) {
  on_target(offset, [&](uint64_t at) { target_.write_zeroes(at, length, {.may_unmap = true}); });
}

// Zeroes as data: the target is to have room for everything.
void CopyJob::fill_with_zeroes(const SourceExtent& extent, base::Buffer& buffer) {
  std::fill(buffer.span().begin(), buffer.span().end(), std::byte{0});
  for (uint64_t done = 0; done < extent.length && !workers_.stopped();) {
    const uint64_t now = std::min<uint64_t>(buffer.size(), extent.length - done);
    write(extent.offset + done, buffer.span().first(now));
    done += now;
  }
}

// Waits until `bytes` more may be copied.
void CopyJob::pace(uint64_t bytes) {
  using std::chrono::nanoseconds;
  const std::lock_guard lock(pacing_);
  const auto now = base::Clock::now();
  if (next_at_ > now) base::io::sleep_for(next_at_ - now);
  const double seconds = static_cast<double>(bytes) / static_cast<double>(options_.rate);
  next_at_ = std::max(now, next_at_) + nanoseconds(static_cast<int64_t>(seconds * 1e9));
}

}  // namespace minivmm::block
