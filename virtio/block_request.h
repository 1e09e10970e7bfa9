// SPDX-License-Identifier: Apache-2.0
// Requests of a block device, out of descriptor chains. Pure: no I/O.
//
// A driver may cut a request into descriptors as it likes: the header is the first 16 readable
// bytes, the status the last writable byte, wherever those lie; the data is the rest.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/iovec.h"
#include "virtio/block_limits.h"
#include "virtio/queue.h"

namespace minivmm::virtio {

struct BlockRequest {
  uint32_t type = 0;  // VIRTIO_BLK_T_*
  uint64_t sector = 0;
  std::span<iovec> data;  // of the direction that the type has; may be empty
  uint64_t data_bytes = 0;
  std::byte* status = nullptr;

  base::IoSpan io() const noexcept { return {data.data(), data.size(), data_bytes}; }
  uint64_t offset() const noexcept { return sector * kSectorBytes; }  // of a checked request
};

enum class ParseResult {
  kOk,
  kShortHeader,  // only `status` is set: the answer is an error
  kNoStatus,     // there is nowhere to answer to
};

// `segments` are the chain's, and are cut in place: the request's data points into them.
ParseResult parse_request(std::span<iovec> segments, const Chain& chain, BlockRequest& request);

// What the driver may ask of this device now.
struct BlockRules {
  const BlockLimits* limits = nullptr;
  uint64_t features = 0;  // negotiated
  uint64_t capacity_sectors = 0;
  bool writable = false;
};

// Checks all of a request but the ranges of DISCARD and WRITE_ZEROES. Returns VIRTIO_BLK_S_OK or
// the status to answer with.
uint8_t check_request(const BlockRequest& request, const BlockRules& rules) noexcept;

// One range of DISCARD or WRITE_ZEROES, in bytes.
struct BlockRange {
  uint64_t offset = 0;
  uint64_t length = 0;
  bool unmap = false;
};

// The ranges of a checked DISCARD or WRITE_ZEROES request, copied out of guest memory and checked:
// all of them before the first is touched.
struct BlockRanges {
  std::array<BlockRange, kMaxRangeSegments> ranges;
  size_t count = 0;
};
uint8_t read_ranges(const BlockRequest& request, const BlockRules& rules,
                    BlockRanges& out) noexcept;

// "read", "write", ...
const char* request_name(uint32_t type) noexcept;

}  // namespace minivmm::virtio
