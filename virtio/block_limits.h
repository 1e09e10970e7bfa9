// SPDX-License-Identifier: Apache-2.0
// What a block device promises its driver: features, limits, and the configuration space that
// tells them. Fixed when the device is made. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "block/graph/types.h"
#include "virtio/block_options.h"

namespace minivmm::virtio {

inline constexpr uint64_t kSectorBytes = 512;  // the unit of the protocol, whatever the block size

struct BlockLimits {
  uint32_t max_segments = 0;       // data segments a request
  uint32_t max_segment_bytes = 0;  // bytes of each
  uint32_t max_discard_sectors = 0;
  uint32_t max_discard_segments = 0;
  uint32_t max_zeroes_sectors = 0;
  uint32_t max_zeroes_segments = 0;
};

// The most that any device promises, for buffers that hold all of them.
inline constexpr uint32_t kMaxRangeSegments = 32;

// The part of the configuration space that can change while the device lives.
struct BlockState {
  uint64_t capacity_sectors = 0;
  bool write_back = false;
};

class BlockShape {
 public:
  // `options` have been checked.
  BlockShape(const BlockOptions& options, const block::Limits& disk, bool writable);

  uint64_t features() const noexcept { return features_; }
  const BlockLimits& limits() const noexcept { return limits_; }
  bool writable() const noexcept { return writable_; }
  // Whole logical blocks of a disk of `bytes`, in sectors.
  uint64_t capacity_sectors(uint64_t bytes) const noexcept;

  // Reads the configuration space; what lies outside it is left alone.
  void read_config(const BlockState& state, uint64_t offset, std::span<std::byte> data) const;
  // Where the driver may write: the one byte of the cache mode.
  static constexpr uint64_t kWriteBackOffset = 32;

 private:
  uint64_t features_ = 0;
  BlockLimits limits_;
  bool writable_;
  uint32_t logical_;
  uint32_t physical_;
  uint32_t optimal_;
  uint32_t discard_granularity_;
  bool may_unmap_;
  uint16_t num_queues_;
};

}  // namespace minivmm::virtio
