// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/wire.h"

#include <cerrno>

#include "base/bytes.h"

namespace minivmm::nbd::wire {

using base::load_be;
using base::store_be;

std::string_view command_name(Command command) noexcept {
  switch (command) {
    case Command::kRead:
      return "READ";
    case Command::kWrite:
      return "WRITE";
    case Command::kDisc:
      return "DISC";
    case Command::kFlush:
      return "FLUSH";
    case Command::kTrim:
      return "TRIM";
    case Command::kCache:
      return "CACHE";
    case Command::kWriteZeroes:
      return "WRITE_ZEROES";
    case Command::kBlockStatus:
      return "BLOCK_STATUS";
  }
  return "unknown command";
}

ErrorCode error_code(int err) noexcept {
  switch (err) {
    case EPERM:
    case EACCES:
    case EROFS:
      return ErrorCode::kPerm;
    case ENOMEM:
      return ErrorCode::kNoMem;
    case EINVAL:
      return ErrorCode::kInval;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return ErrorCode::kNoSpc;
    case EOVERFLOW:
      return ErrorCode::kOverflow;
    case EOPNOTSUPP:
      return ErrorCode::kNotSup;
    case ESHUTDOWN:
      return ErrorCode::kShutdown;
    default:
      return ErrorCode::kIo;
  }
}

std::array<std::byte, kHelloSize> encode_hello() noexcept {
  std::array<std::byte, kHelloSize> out;
  store_be<uint64_t>(out.data(), kNbdMagic);
  store_be<uint64_t>(out.data() + 8, kOptionMagic);
  store_be<uint16_t>(out.data() + 16, kFixedNewstyle | kNoZeroes);
  return out;
}

std::optional<OptionHeader> decode_option_header(
    std::span<const std::byte, kOptionHeaderSize> from) noexcept {
  if (load_be<uint64_t>(from.data()) != kOptionMagic) return std::nullopt;
  return OptionHeader{load_be<uint32_t>(from.data() + 8), load_be<uint32_t>(from.data() + 12)};
}

std::array<std::byte, kOptionReplySize> encode_option_reply(uint32_t option, OptionReply type,
                                                            uint32_t length) noexcept {
  std::array<std::byte, kOptionReplySize> out;
  store_be<uint64_t>(out.data(), kOptionReplyMagic);
  store_be<uint32_t>(out.data() + 8, option);
  store_be<uint32_t>(out.data() + 12, static_cast<uint32_t>(type));
  store_be<uint32_t>(out.data() + 16, length);
  return out;
}

std::array<std::byte, kExportNameReplyLong> encode_export_name_reply(uint64_t size,
                                                                     uint16_t flags) noexcept {
  std::array<std::byte, kExportNameReplyLong> out{};
  store_be<uint64_t>(out.data(), size);
  store_be<uint16_t>(out.data() + 8, flags);
  return out;
}

std::array<std::byte, 12> encode_info_export(uint64_t size, uint16_t flags) noexcept {
  std::array<std::byte, 12> out;
  store_be<uint16_t>(out.data(), static_cast<uint16_t>(Info::kExport));
  store_be<uint64_t>(out.data() + 2, size);
  store_be<uint16_t>(out.data() + 10, flags);
  return out;
}

std::array<std::byte, 14> encode_info_block_size(uint32_t minimum, uint32_t preferred,
                                                 uint32_t maximum) noexcept {
  std::array<std::byte, 14> out;
  store_be<uint16_t>(out.data(), static_cast<uint16_t>(Info::kBlockSize));
  store_be<uint32_t>(out.data() + 2, minimum);
  store_be<uint32_t>(out.data() + 6, preferred);
  store_be<uint32_t>(out.data() + 10, maximum);
  return out;
}

std::optional<Request> decode_request(const std::byte* p, Headers headers) noexcept {
  const bool extended = headers == Headers::kExtended;
  if (load_be<uint32_t>(p) != (extended ? kExtendedRequestMagic : kRequestMagic)) {
    return std::nullopt;
  }
  Request out;
  out.flags = load_be<uint16_t>(p + 4);
  out.type = load_be<uint16_t>(p + 6);
  out.cookie = load_be<uint64_t>(p + 8);
  out.offset = load_be<uint64_t>(p + 16);
  out.length = extended ? load_be<uint64_t>(p + 24) : load_be<uint32_t>(p + 24);
  const bool brings = extended ? (out.flags & kPayloadLen) != 0
                               : out.type == static_cast<uint16_t>(Command::kWrite);
  if (brings) out.payload = out.length;
  return out;
}

uint32_t StatusQuery::id(size_t i) const noexcept { return load_be<uint32_t>(ids + 4 * i); }

std::optional<StatusQuery> decode_status_query(std::span<const std::byte> from) noexcept {
  if (from.size() < kStatusQuerySize || from.size() % 4 != 0) return std::nullopt;
  return StatusQuery{load_be<uint64_t>(from.data()), (from.size() - kStatusQuerySize) / 4,
                     from.data() + kStatusQuerySize};
}

void encode_simple_reply(std::byte* to, ErrorCode error, uint64_t cookie) noexcept {
  store_be<uint32_t>(to, kSimpleReplyMagic);
  store_be<uint32_t>(to + 4, static_cast<uint32_t>(error));
  store_be<uint64_t>(to + 8, cookie);
}

size_t encode_chunk(std::byte* to, const Answered& answered, uint16_t flags, ChunkType type,
                    uint64_t length) noexcept {
  store_be<uint32_t>(to, answered.extended ? kExtendedChunkMagic : kChunkMagic);
  store_be<uint16_t>(to + 4, flags);
  store_be<uint16_t>(to + 6, static_cast<uint16_t>(type));
  store_be<uint64_t>(to + 8, answered.cookie);
  if (!answered.extended) {
    store_be<uint32_t>(to + 16, static_cast<uint32_t>(length));
    return kChunkHeaderSize;
  }
  store_be<uint64_t>(to + 16, answered.offset);
  store_be<uint64_t>(to + 24, length);
  return kExtendedChunkHeaderSize;
}

size_t encode_data_chunk(std::byte* to, const Answered& answered, uint16_t flags, uint64_t offset,
                         uint32_t data_length) noexcept {
  const size_t head =
      encode_chunk(to, answered, flags, ChunkType::kOffsetData, uint64_t{8} + data_length);
  store_be<uint64_t>(to + head, offset);
  return head + 8;
}

size_t encode_hole_chunk(std::byte* to, const Answered& answered, uint16_t flags, uint64_t offset,
                         uint32_t hole_length) noexcept {
  const size_t head = encode_chunk(to, answered, flags, ChunkType::kOffsetHole, 12);
  store_be<uint64_t>(to + head, offset);
  store_be<uint32_t>(to + head + 8, hole_length);
  return head + 12;
}

size_t encode_error_chunk(std::byte* to, const Answered& answered, uint16_t flags, ErrorCode error,
                          uint16_t message_length) noexcept {
  const size_t head =
      encode_chunk(to, answered, flags, ChunkType::kError, uint64_t{6} + message_length);
  store_be<uint32_t>(to + head, static_cast<uint32_t>(error));
  store_be<uint16_t>(to + head + 4, message_length);
  return head + 6;
}

size_t encode_status_chunk(std::byte* to, const Answered& answered, uint16_t flags,
                           uint32_t context, uint32_t extents) noexcept {
  const uint64_t list = uint64_t{extents} * extent_size(answered.extended);
  if (!answered.extended) {
    const size_t head = encode_chunk(to, answered, flags, ChunkType::kBlockStatus, 4 + list);
    store_be<uint32_t>(to + head, context);
    return head + 4;
  }
  const size_t head = encode_chunk(to, answered, flags, ChunkType::kBlockStatusExt, 8 + list);
  store_be<uint32_t>(to + head, context);
  store_be<uint32_t>(to + head + 4, extents);
  return head + 8;
}

void encode_extent(std::byte* to, bool extended, uint64_t length, uint32_t status) noexcept {
  if (extended) {
    store_be<uint64_t>(to, length);
    store_be<uint64_t>(to + 8, status);
  } else {
    store_be<uint32_t>(to, static_cast<uint32_t>(length));
    store_be<uint32_t>(to + 4, status);
  }
}

}  // namespace minivmm::nbd::wire
