// SPDX-License-Identifier: Apache-2.0
#include "virtio/block_limits.h"

#include <linux/virtio_blk.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>

#include "base/bytes.h"
#include "base/checked.h"
#include "virtio/queue.h"

namespace minivmm::virtio {
namespace {

constexpr uint32_t kMaxSegmentBytes = 1 << 20;
// Long ranges are cheap where the disk has an operation for them; elsewhere zeroes are written out,
// and a request should not take seconds.
constexpr uint32_t kCheapRangeSectors = (uint64_t{2} << 30) / kSectorBytes;
constexpr uint32_t kWrittenRangeSectors = (uint64_t{32} << 20) / kSectorBytes;

constexpr uint64_t bit(unsigned number) noexcept { return uint64_t{1} << number; }

}  // namespace

static_assert(offsetof(virtio_blk_config, wce) == BlockShape::kWriteBackOffset);

BlockShape::BlockShape(const BlockOptions& options, const block::Limits& disk, bool writable)
    : writable_(writable && !options.read_only),
      logical_(options.logical_block_size),
      physical_(options.physical_block_size),
      optimal_(disk.optimal_io),
      may_unmap_(disk.can_discard),
      num_queues_(options.num_queues) {
  if (physical_ == 0) {
    const uint32_t preferred = std::bit_floor(std::max(disk.request_alignment, uint32_t{1}));
    physical_ = std::max(logical_, preferred);
  }
  discard_granularity_ = std::max(disk.discard_granularity, logical_);
  // One descriptor for the header and one for the status.
  limits_.max_segments = options.queue_size - 2U;
  limits_.max_segment_bytes = kMaxSegmentBytes;
  features_ = bit(VIRTIO_F_VERSION_1) | bit(VIRTIO_BLK_F_SEG_MAX) | bit(VIRTIO_BLK_F_SIZE_MAX) |
              bit(VIRTIO_BLK_F_BLK_SIZE) | bit(VIRTIO_BLK_F_TOPOLOGY) | bit(VIRTIO_BLK_F_FLUSH) |
              bit(VIRTIO_BLK_F_CONFIG_WCE);
  if (options.indirect) features_ |= bit(VIRTIO_F_INDIRECT_DESC);
  if (options.event_index) features_ |= bit(VIRTIO_F_EVENT_IDX);
  if (num_queues_ > 1) features_ |= bit(VIRTIO_BLK_F_MQ);
  if (!writable_) {
    features_ |= bit(VIRTIO_BLK_F_RO);
    return;
  }
  features_ |= bit(VIRTIO_BLK_F_WRITE_ZEROES);
  limits_.max_zeroes_sectors = disk.can_write_zeroes ? kCheapRangeSectors : kWrittenRangeSectors;
  limits_.max_zeroes_segments = kMaxRangeSegments;
  if (!disk.can_discard) return;
  features_ |= bit(VIRTIO_BLK_F_DISCARD);
  limits_.max_discard_sectors = kCheapRangeSectors;
  limits_.max_discard_segments = kMaxRangeSegments;
}

uint64_t BlockShape::capacity_sectors(uint64_t bytes) const noexcept {
  return base::align_down<uint64_t>(bytes, logical_) / kSectorBytes;
}

void BlockShape::read_config(const BlockState& state, uint64_t offset,
                             std::span<std::byte> data) const {
  using base::host_to_le;
  virtio_blk_config c{};
  c.capacity = host_to_le(state.capacity_sectors);
  c.size_max = host_to_le(limits_.max_segment_bytes);
  c.seg_max = host_to_le(limits_.max_segments);
  c.blk_size = host_to_le(logical_);
  c.physical_block_exp = static_cast<uint8_t>(std::countr_zero(physical_ / logical_));
  c.min_io_size =
      host_to_le(static_cast<uint16_t>(std::min<uint32_t>(physical_ / logical_, UINT16_MAX)));
  c.opt_io_size = host_to_le(optimal_ / logical_);
  c.wce = state.write_back ? 1 : 0;
  c.num_queues = host_to_le(num_queues_);
  c.max_discard_sectors = host_to_le(limits_.max_discard_sectors);
  c.max_discard_seg = host_to_le(limits_.max_discard_segments);
  c.discard_sector_alignment =
      host_to_le(static_cast<uint32_t>(discard_granularity_ / kSectorBytes));
  c.max_write_zeroes_sectors = host_to_le(limits_.max_zeroes_sectors);
  c.max_write_zeroes_seg = host_to_le(limits_.max_zeroes_segments);
  c.write_zeroes_may_unmap = may_unmap_ && writable_ ? 1 : 0;
  if (offset >= sizeof c) return;
  const size_t count = std::min<size_t>(data.size(), sizeof c - static_cast<size_t>(offset));
  std::memcpy(data.data(), reinterpret_cast<const std::byte*>(&c) + offset, count);
}

}  // namespace minivmm::virtio
