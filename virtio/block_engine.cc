// SPDX-License-Identifier: Apache-2.0
#include "virtio/block_engine.h"

#include <linux/virtio_blk.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <exception>

#include <fmt/core.h>

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
  for (;;) {
    int error = 0;
    std::string why;
    const uint8_t status = attempt(request, error, why);
    // Refused without an errno: the guest asked for something wrong.
    if (status == VIRTIO_BLK_S_OK || error == 0) return status;
    switch (judge(request, error, why)) {
      case Verdict::kFail:
        report(request, why);
        return status;
      case Verdict::kSucceed:
        report(request, why);
        return VIRTIO_BLK_S_OK;
      case Verdict::kAgain:
        break;
    }
  }
}

uint8_t BlockEngine::attempt(const BlockRequest& request, int& error, std::string& why) noexcept {
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
    error = e.err();
    why = e.what();
  } catch (const std::exception& e) {
    error = EIO;
    why = e.what();
  }
  return error == ENOTSUP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}

BlockEngine::Verdict BlockEngine::judge(const BlockRequest& request, int error,
                                        const std::string& why) noexcept {
  const bool read = request.type == VIRTIO_BLK_T_IN;
  ErrorAction action = read ? options_.read_error : options_.write_error;
  if (error == ENOTSUP || request.type == VIRTIO_BLK_T_GET_ID) return Verdict::kFail;
  if (action == ErrorAction::kNoSpace) {
    action = error == ENOSPC ? ErrorAction::kStop : ErrorAction::kReport;
  }
  try {
    if (options_.on_error) options_.on_error({read, error == ENOSPC, action, why});
  } catch (const std::exception&) {
    // No memory to tell of it; the guest hears of it all the same.
  }
  if (action == ErrorAction::kIgnore) return Verdict::kSucceed;
  if (action == ErrorAction::kReport) return Verdict::kFail;
  try {
    return wait_for_resume(request, why) ? Verdict::kAgain : Verdict::kFail;
  } catch (const std::exception&) {
    return Verdict::kFail;  // no memory for the message that would tell how to go on
  }
}

bool BlockEngine::wait_for_resume(const BlockRequest& request, const std::string& why) {
  std::unique_lock lock(waiting_mutex_);
  if (wait_no_more_) return false;
  const uint64_t before = times_resumed_;
  lock.unlock();
  errors_.fetch_add(1, std::memory_order_relaxed);
  if (options_.on_stop) {
    options_.on_stop(fmt::format("{}: {} of {} bytes at sector {} failed: {}", options_.name,
                                 request_name(request.type), request.data_bytes, request.sector,
                                 why));
  }
  lock.lock();
  while (times_resumed_ == before && !wait_no_more_) waiting_.wait(lock, "somebody to go on");
  return !wait_no_more_;
}

void BlockEngine::resume() noexcept {
  const std::lock_guard lock(waiting_mutex_);
  ++times_resumed_;
  waiting_.notify_all();
}

void BlockEngine::wait_no_more() noexcept {
  const std::lock_guard lock(waiting_mutex_);
  wait_no_more_ = true;
  waiting_.notify_all();
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
