// SPDX-License-Identifier: Apache-2.0
#include "virtio/block_request.h"

#include <linux/virtio_blk.h>

#include <algorithm>
#include <atomic>

#include "base/bytes.h"
#include "base/checked.h"
#include "virtio/guest_access.h"

namespace minivmm::virtio {
namespace {

constexpr size_t kHeaderBytes = 16;  // type u32, reserved u32, sector u64
constexpr size_t kRangeBytes = 16;   // sector u64, sectors u32, flags u32
constexpr uint32_t kUnmapFlag = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

uint64_t total_bytes(std::span<const iovec> segments) noexcept {
  uint64_t sum = 0;
  for (const iovec& s : segments) sum += s.iov_len;
  return sum;
}

// Moves the first bytes of `segments` to `to`; false if there are fewer.
bool take_front(std::span<iovec>& segments, std::span<std::byte> to) noexcept {
  while (!to.empty()) {
    if (segments.empty()) return false;
    iovec& first = segments.front();
    const size_t count = std::min(first.iov_len, to.size());
    auto* const from = static_cast<std::byte*>(first.iov_base);
    copy_from_guest(to.data(), from, count);
    to = to.subspan(count);
    first.iov_base = from + count;
    first.iov_len -= count;
    if (first.iov_len == 0) segments = segments.subspan(1);
  }
  return true;
}

std::byte* take_last_byte(std::span<iovec>& segments) noexcept {
  if (segments.empty()) return nullptr;
  iovec& last = segments.back();
  auto* const byte = static_cast<std::byte*>(last.iov_base) + --last.iov_len;
  if (last.iov_len == 0) segments = segments.first(segments.size() - 1);
  return byte;
}

bool has_feature(const BlockRules& rules, unsigned bit) noexcept {
  return (rules.features >> bit & 1) != 0;
}

uint8_t check_transfer(const BlockRequest& request, const BlockRules& rules) noexcept {
  const BlockLimits& limits = *rules.limits;
  if (request.data_bytes % kSectorBytes != 0) return VIRTIO_BLK_S_IOERR;
  if (!base::range_fits(request.sector, request.data_bytes / kSectorBytes,
                        rules.capacity_sectors)) {
    return VIRTIO_BLK_S_IOERR;
  }
  if (has_feature(rules, VIRTIO_BLK_F_SEG_MAX) && request.data.size() > limits.max_segments) {
    return VIRTIO_BLK_S_IOERR;
  }
  if (has_feature(rules, VIRTIO_BLK_F_SIZE_MAX)) {
    for (const iovec& s : request.data) {
      if (s.iov_len > limits.max_segment_bytes) return VIRTIO_BLK_S_IOERR;
    }
  }
  return VIRTIO_BLK_S_OK;
}

uint8_t check_ranges_request(const BlockRequest& request, const BlockRules& rules, unsigned feature,
                             uint32_t max_segments) noexcept {
  if (!has_feature(rules, feature)) return VIRTIO_BLK_S_UNSUPP;
  const bool fits = request.data_bytes != 0 && request.data_bytes % kRangeBytes == 0 &&
                    request.data_bytes / kRangeBytes <= max_segments;
  return fits && rules.writable ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
}

}  // namespace

ParseResult parse_request(std::span<iovec> segments, const Chain& chain, BlockRequest& request) {
  std::span<iovec> readable = segments.first(chain.readable);
  std::span<iovec> writable = segments.subspan(chain.readable, chain.writable);
  request = {};
  request.status = take_last_byte(writable);
  if (request.status == nullptr) return ParseResult::kNoStatus;
  std::byte header[kHeaderBytes];
  if (!take_front(readable, header)) return ParseResult::kShortHeader;
  request.type = base::load_le<uint32_t>(header);
  request.sector = base::load_le<uint64_t>(header + 8);
  const bool to_guest = request.type == VIRTIO_BLK_T_IN || request.type == VIRTIO_BLK_T_GET_ID;
  request.data = to_guest ? writable : readable;
  request.data_bytes = total_bytes(request.data);
  return ParseResult::kOk;
}

uint8_t check_request(const BlockRequest& request, const BlockRules& rules) noexcept {
  switch (request.type) {
    case VIRTIO_BLK_T_IN:
      return check_transfer(request, rules);
    case VIRTIO_BLK_T_OUT:
      return rules.writable ? check_transfer(request, rules) : uint8_t{VIRTIO_BLK_S_IOERR};
    case VIRTIO_BLK_T_FLUSH:
    case VIRTIO_BLK_T_GET_ID:
      return VIRTIO_BLK_S_OK;
    case VIRTIO_BLK_T_DISCARD:
      return check_ranges_request(request, rules, VIRTIO_BLK_F_DISCARD,
                                  rules.limits->max_discard_segments);
    case VIRTIO_BLK_T_WRITE_ZEROES:
      return check_ranges_request(request, rules, VIRTIO_BLK_F_WRITE_ZEROES,
                                  rules.limits->max_zeroes_segments);
    default:
      return VIRTIO_BLK_S_UNSUPP;
  }
}

uint8_t read_ranges(const BlockRequest& request, const BlockRules& rules,
                    BlockRanges& out) noexcept {
  const bool zeroes = request.type == VIRTIO_BLK_T_WRITE_ZEROES;
  const uint32_t max_sectors =
      zeroes ? rules.limits->max_zeroes_sectors : rules.limits->max_discard_sectors;
  // The unmap flag says something only for zeroes; for a discard the specification refuses it.
  const uint32_t known_flags = zeroes ? kUnmapFlag : 0;
  out.count = static_cast<size_t>(request.data_bytes / kRangeBytes);
  for (size_t i = 0; i < out.count; ++i) {
    std::byte raw[kRangeBytes];
    base::copy_from(request.io(), i * kRangeBytes, raw);
    std::atomic_signal_fence(std::memory_order_seq_cst);  // as in copy_from_guest
    const uint64_t sector = base::load_le<uint64_t>(raw);
    const uint32_t sectors = base::load_le<uint32_t>(raw + 8);
    const uint32_t flags = base::load_le<uint32_t>(raw + 12);
    if ((flags & ~known_flags) != 0) return VIRTIO_BLK_S_UNSUPP;
    if (sectors > max_sectors || !base::range_fits(sector, sectors, rules.capacity_sectors)) {
      return VIRTIO_BLK_S_IOERR;
    }
    out.ranges[i] = {sector * kSectorBytes, uint64_t{sectors} * kSectorBytes,
                     (flags & kUnmapFlag) != 0};
  }
  return VIRTIO_BLK_S_OK;
}

const char* request_name(uint32_t type) noexcept {
  switch (type) {
    case VIRTIO_BLK_T_IN:
      return "read";
    case VIRTIO_BLK_T_OUT:
      return "write";
    case VIRTIO_BLK_T_FLUSH:
      return "flush";
    case VIRTIO_BLK_T_GET_ID:
      return "id";
    case VIRTIO_BLK_T_DISCARD:
      return "discard";
    case VIRTIO_BLK_T_WRITE_ZEROES:
      return "write zeroes";
    default:
      return "unknown request";
  }
}

}  // namespace minivmm::virtio
