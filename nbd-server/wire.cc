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

std::optional<Request> decode_request(std::span<const std::byte, kRequestSize> from) noexcept {
  const std::byte* const p = from.data();
  if (load_be<uint32_t>(p) != kRequestMagic) return std::nullopt;
  return Request{load_be<uint16_t>(p + 4), load_be<uint16_t>(p + 6), load_be<uint64_t>(p + 8),
                 load_be<uint64_t>(p + 16), load_be<uint32_t>(p + 24)};
}

void encode_simple_reply(std::byte* to, ErrorCode error, uint64_t cookie) noexcept {
  store_be<uint32_t>(to, kSimpleReplyMagic);
  store_be<uint32_t>(to + 4, static_cast<uint32_t>(error));
  store_be<uint64_t>(to + 8, cookie);
}

void encode_chunk(std::byte* to, uint16_t flags, ChunkType type, uint64_t cookie,
                  uint32_t length) noexcept {
  store_be<uint32_t>(to, kChunkMagic);
  store_be<uint16_t>(to + 4, flags);
  store_be<uint16_t>(to + 6, static_cast<uint16_t>(type));
  store_be<uint64_t>(to + 8, cookie);
  store_be<uint32_t>(to + 16, length);
}

void encode_data_chunk(std::byte* to, uint16_t flags, uint64_t cookie, uint64_t offset,
                       uint32_t data_length) noexcept {
  encode_chunk(to, flags, ChunkType::kOffsetData, cookie, 8 + data_length);
  store_be<uint64_t>(to + kChunkHeaderSize, offset);
}

void encode_hole_chunk(std::byte* to, uint16_t flags, uint64_t cookie, uint64_t offset,
                       uint32_t hole_length) noexcept {
  encode_chunk(to, flags, ChunkType::kOffsetHole, cookie, 12);
  store_be<uint64_t>(to + kChunkHeaderSize, offset);
  store_be<uint32_t>(to + kChunkHeaderSize + 8, hole_length);
}

void encode_error_chunk(std::byte* to, uint16_t flags, uint64_t cookie, ErrorCode error,
                        uint16_t message_length) noexcept {
  encode_chunk(to, flags, ChunkType::kError, cookie, 6u + message_length);
  store_be<uint32_t>(to + kChunkHeaderSize, static_cast<uint32_t>(error));
  store_be<uint16_t>(to + kChunkHeaderSize + 4, message_length);
}

void encode_status_chunk(std::byte* to, uint16_t flags, uint64_t cookie, uint32_t context,
                         uint32_t extents) noexcept {
  encode_chunk(to, flags, ChunkType::kBlockStatus, cookie,
               static_cast<uint32_t>(4 + extents * kExtentSize));
  store_be<uint32_t>(to + kChunkHeaderSize, context);
}

void encode_extent(std::byte* to, uint32_t length, uint32_t status) noexcept {
  store_be<uint32_t>(to, length);
  store_be<uint32_t>(to + 4, status);
}

}  // namespace minivmm::nbd::wire
