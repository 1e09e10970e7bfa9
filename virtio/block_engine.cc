// SPDX-License-Identifier: Apache-2.0
#include "virtio/block_engine.h"

#include <linux/virtio_blk.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <exception>

#include "base/error.h"

namespace minivmm::virtio {

BlockEngine::BlockEngine(block::Handle disk, const BlockOptions& options)
    : options_(options), disk_(std::move(disk)), shape_(options, disk_.limits(), disk_.writable()) {
  forget_driver();
  capacity_.store(shape_.capacity_sectors(disk_.size()), std::memory_order_relaxed);
  const uint64_t cut = disk_.size() - capacity_sectors() * kSectorBytes;
  if (cut != 0) {
    base::log_warning("{}: the last {} bytes of {} do not fill a block of {} and are left out",
                      options_.name, cut, disk_.describe(), options_.logical_block_size);
  }
}

BlockRules BlockEngine::rules() const noexcept {
  return {.limits = &shape_.limits(),
          .features = features_.load(std::memory_order_relaxed),
          .capacity_sectors = capacity_sectors(),
          .writable = shape_.writable()};
}

void BlockEngine::set_features(uint64_t features) noexcept {
  features_.store(features, std::memory_order_relaxed);
  // A driver that cannot flush must never need to.
  set_write_back(negotiated(VIRTIO_BLK_F_FLUSH) && options_.write_cache);
}

void BlockEngine::forget_driver() noexcept {
  features_.store(0, std::memory_order_relaxed);
  set_write_back(options_.write_cache);
}

void BlockEngine::set_write_back(bool on) noexcept {
  const bool was = write_back_.exchange(on, std::memory_order_acq_rel);
  if (was && !on) times_off_.fetch_add(1, std::memory_order_acq_rel);
}

bool BlockEngine::update_capacity() noexcept {
  const uint64_t now = shape_.capacity_sectors(disk_.size());
  return capacity_.exchange(now, std::memory_order_acq_rel) != now;
}

uint8_t BlockEngine::run(const BlockRequest& request) noexcept {
  try {
    switch (request.type) {
      case VIRTIO_BLK_T_DISCARD:
      case VIRTIO_BLK_T_WRITE_ZEROES:
        return run_ranges(request);
      default:
        perform(request);
        return VIRTIO_BLK_S_OK;
    }
  } catch (const base::Error& e) {
    report(request, e.what());
    return e.err() == ENOTSUP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
  } catch (const std::exception& e) {
    report(request, e.what());
    return VIRTIO_BLK_S_IOERR;
  }
}

bool BlockEngine::try_transfer(uint32_t type, uint64_t offset, base::IoSpan io) noexcept {
  try {
    transfer(type, offset, io);
    return true;
  } catch (const std::exception&) {
    return false;  // found again, and reported, by the request that it belongs to
  }
}

void BlockEngine::perform(const BlockRequest& request) {
  switch (request.type) {
    case VIRTIO_BLK_T_FLUSH:
      disk_.flush();
      return;
    case VIRTIO_BLK_T_GET_ID:
      write_id(request);
      return;
    default:
      if (request.data_bytes != 0) transfer(request.type, request.offset(), request.io());
      return;
  }
}

void BlockEngine::transfer(uint32_t type, uint64_t offset, base::IoSpan io) {
  if (type == VIRTIO_BLK_T_IN) {
    disk_.read(offset, io);
    return;
  }
  const bool through = !write_back();
  disk_.write(offset, io, {.fua = through});
  if (through) settle_write_through();
}

void BlockEngine::settle_write_through() {
  const uint64_t times = times_off_.load(std::memory_order_acquire);
  if (times_settled_.load(std::memory_order_acquire) == times) return;
  disk_.flush();
  // Only now: writes that complete meanwhile must not pass the older ones.
  times_settled_.store(times, std::memory_order_release);
}

uint8_t BlockEngine::run_ranges(const BlockRequest& request) {
  BlockRanges ranges;
  const uint8_t status = read_ranges(request, rules(), ranges);
  if (status != VIRTIO_BLK_S_OK) return status;
  const bool through = !write_back();
  for (const BlockRange& range : std::span(ranges.ranges).first(ranges.count)) {
    if (range.length == 0) continue;
    if (request.type == VIRTIO_BLK_T_DISCARD) {
      disk_.discard(range.offset, range.length);
    } else {
      disk_.write_zeroes(range.offset, range.length, {.fua = through, .may_unmap = range.unmap});
    }
  }
  if (through) settle_write_through();
  return VIRTIO_BLK_S_OK;
}

void BlockEngine::write_id(const BlockRequest& request) const noexcept {
  std::array<std::byte, VIRTIO_BLK_ID_BYTES> id{};
  std::memcpy(id.data(), options_.serial.data(), options_.serial.size());
  base::copy_to(request.io(), 0, id);
}

void BlockEngine::report(const BlockRequest& request, std::string_view why) noexcept {
  errors_.fetch_add(1, std::memory_order_relaxed);
  uint64_t suppressed = 0;
  if (!complaints_.allow(&suppressed)) return;
  try {
    base::log_warning("{}: {} of {} bytes at sector {} failed: {} ({} more not shown)",
                      options_.name, request_name(request.type), request.data_bytes, request.sector,
                      why, suppressed);
  } catch (...) {
    // No memory for the text. The guest is told all the same.
  }
}

}  // namespace minivmm::virtio
