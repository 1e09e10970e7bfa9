// SPDX-License-Identifier: Apache-2.0
// The NBD protocol as bytes. Pure: spans in, values out; no socket, no loop, no allocation. Names
// are the specification's (doc/proto.md of the NBD project) in our spelling: NBD_CMD_READ is
// Command::kRead. All integers on the wire are big-endian.
//
//   handshake     S: NBDMAGIC IHAVEOPT flags:16          C: flags:32
//   option        C: IHAVEOPT option:32 length:32 data
//   option reply  S: magic:64 option:32 type:32 length:32 data
//   request       C: magic:32 flags:16 type:16 cookie:64 offset:64 length:32 [payload]
//   simple reply  S: magic:32 error:32 cookie:64 [payload]
//   chunk         S: magic:32 flags:16 type:16 cookie:64 length:32 [payload]
// with extended headers:
//   request       C: magic:32 flags:16 type:16 cookie:64 offset:64 length:64 [payload]
//   chunk         S: magic:32 flags:16 type:16 cookie:64 offset:64 length:64 [payload]
#pragma once

#include <string_view>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace minivmm::nbd::wire {

inline constexpr uint64_t kNbdMagic = 0x4e42444d41474943;     // "NBDMAGIC"
inline constexpr uint64_t kOptionMagic = 0x49484156454f5054;  // "IHAVEOPT"
inline constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;
inline constexpr uint32_t kRequestMagic = 0x25609513;
inline constexpr uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr uint32_t kChunkMagic = 0x668e33ef;
inline constexpr uint32_t kExtendedRequestMagic = 0x21e41c71;
inline constexpr uint32_t kExtendedChunkMagic = 0x6e8a278c;

// The largest payload of a request or reply; what INFO_BLOCK_SIZE tells.
inline constexpr uint32_t kMaxPayload = 32u << 20;
// No string is longer: names, descriptions, messages.
inline constexpr size_t kMaxString = 4096;

enum HandshakeFlag : uint16_t { kFixedNewstyle = 1, kNoZeroes = 2 };
inline constexpr uint32_t kKnownClientFlags = kFixedNewstyle | kNoZeroes;

enum TransmissionFlag : uint16_t {
  kHasFlags = 1 << 0,
  kReadOnly = 1 << 1,
  kSendFlush = 1 << 2,
  kSendFua = 1 << 3,
  kSendTrim = 1 << 5,
  kSendWriteZeroes = 1 << 6,
  kSendDf = 1 << 7,
  kCanMultiConn = 1 << 8,
  kSendCache = 1 << 10,
  kSendFastZero = 1 << 11,
  kBlockStatusPayload = 1 << 12,
};

enum class Option : uint32_t {
  kExportName = 1,
  kAbort = 2,
  kList = 3,
  kStartTls = 5,
  kInfo = 6,
  kGo = 7,
  kStructuredReply = 8,
  kListMetaContext = 9,
  kSetMetaContext = 10,
  kExtendedHeaders = 11,
};

inline constexpr uint32_t kErrorBit = uint32_t{1} << 31;
enum class OptionReply : uint32_t {
  kAck = 1,
  kServer = 2,
  kInfo = 3,
  kMetaContext = 4,
  kErrUnsup = kErrorBit | 1,
  kErrPolicy = kErrorBit | 2,
  kErrInvalid = kErrorBit | 3,
  kErrTlsReqd = kErrorBit | 5,
  kErrUnknown = kErrorBit | 6,
  kErrShutdown = kErrorBit | 7,
  kErrTooBig = kErrorBit | 9,
  kErrExtHeaderReqd = kErrorBit | 10,
};

enum class Info : uint16_t { kExport = 0, kName = 1, kDescription = 2, kBlockSize = 3 };

enum class Command : uint16_t {
  kRead = 0,
  kWrite = 1,
  kDisc = 2,
  kFlush = 3,
  kTrim = 4,
  kCache = 5,
  kWriteZeroes = 6,
  kBlockStatus = 7,
};
std::string_view command_name(Command command) noexcept;

enum CommandFlag : uint16_t {
  kFua = 1 << 0,
  kNoHole = 1 << 1,
  kDf = 1 << 2,
  kReqOne = 1 << 3,
  kFastZero = 1 << 4,
  kPayloadLen = 1 << 5,
};

enum class ChunkType : uint16_t {
  kNone = 0,
  kOffsetData = 1,
  kOffsetHole = 2,
  kBlockStatus = 5,
  kBlockStatusExt = 6,
  kError = 0x8001,
};
inline constexpr uint16_t kChunkDone = 1;

// Bits of a base:allocation status.
inline constexpr uint32_t kStateHole = 1;
inline constexpr uint32_t kStateZero = 2;

// The values that may stand in an error field.
enum class ErrorCode : uint32_t {
  kNone = 0,
  kPerm = 1,
  kIo = 5,
  kNoMem = 12,
  kInval = 22,
  kNoSpc = 28,
  kOverflow = 75,
  kNotSup = 95,
  kShutdown = 108,
};
// What the protocol has for an errno value; EIO for most.
ErrorCode error_code(int err) noexcept;

// --- handshake ---

inline constexpr size_t kHelloSize = 18;
std::array<std::byte, kHelloSize> encode_hello() noexcept;

struct OptionHeader {
  uint32_t option = 0;
  uint32_t length = 0;
};
inline constexpr size_t kOptionHeaderSize = 16;
// Nullopt: the magic is wrong.
std::optional<OptionHeader> decode_option_header(
    std::span<const std::byte, kOptionHeaderSize> from) noexcept;

inline constexpr size_t kOptionReplySize = 20;
std::array<std::byte, kOptionReplySize> encode_option_reply(uint32_t option, OptionReply type,
                                                            uint32_t length) noexcept;

// The answer to EXPORT_NAME; without its zeroes it ends after kExportNameReplyShort bytes.
inline constexpr size_t kExportNameReplyShort = 10;
inline constexpr size_t kExportNameReplyLong = kExportNameReplyShort + 124;
std::array<std::byte, kExportNameReplyLong> encode_export_name_reply(uint64_t size,
                                                                     uint16_t flags) noexcept;

std::array<std::byte, 12> encode_info_export(uint64_t size, uint16_t flags) noexcept;
std::array<std::byte, 14> encode_info_block_size(uint32_t minimum, uint32_t preferred,
                                                 uint32_t maximum) noexcept;

// --- transmission ---

// How the server answers, and with extended headers how it is asked.
enum class Headers : uint8_t { kSimple, kStructured, kExtended };

struct Request {
  uint16_t flags = 0;
  uint16_t type = 0;
  uint64_t cookie = 0;
  uint64_t offset = 0;
  uint64_t length = 0;
  // Of the bytes that follow; a WRITE's length. With extended headers the flag PAYLOAD_LEN says
  // whether there are any, whatever the command.
  uint64_t payload = 0;
};
inline constexpr size_t kRequestSize = 28;
inline constexpr size_t kExtendedRequestSize = 32;
constexpr size_t request_size(Headers headers) noexcept {
  return headers == Headers::kExtended ? kExtendedRequestSize : kRequestSize;
}
// Reads request_size(headers) bytes. Nullopt: the magic is wrong.
std::optional<Request> decode_request(const std::byte* from, Headers headers) noexcept;

// The payload that a BLOCK_STATUS may bring: the length that it asks about, and the ids of the
// contexts. Points into the bytes that were given.
struct StatusQuery {
  uint64_t length = 0;
  size_t count = 0;
  const std::byte* ids = nullptr;
  uint32_t id(size_t i) const noexcept;
};
inline constexpr size_t kStatusQuerySize = 8;
// Nullopt: not a whole number of ids.
std::optional<StatusQuery> decode_status_query(std::span<const std::byte> from) noexcept;

inline constexpr size_t kSimpleReplySize = 16;
void encode_simple_reply(std::byte* to, ErrorCode error, uint64_t cookie) noexcept;

// Which request a chunk answers, and in which form.
struct Answered {
  uint64_t cookie;
  uint64_t offset;
  bool extended;
};
inline constexpr size_t kChunkHeaderSize = 20;
inline constexpr size_t kExtendedChunkHeaderSize = 32;
// Room that each of the following needs at most.
inline constexpr size_t kMaxChunkHead = kExtendedChunkHeaderSize + 12;
// Each returns how many bytes it has written: the header and what of the payload has a fixed
// length. The rest of the payload follows.
size_t encode_chunk(std::byte* to, const Answered& answered, uint16_t flags, ChunkType type,
                    uint64_t length) noexcept;
// `data_length` bytes of data follow.
size_t encode_data_chunk(std::byte* to, const Answered& answered, uint16_t flags, uint64_t offset,
                         uint32_t data_length) noexcept;
size_t encode_hole_chunk(std::byte* to, const Answered& answered, uint16_t flags, uint64_t offset,
                         uint32_t hole_length) noexcept;
// `message_length` bytes of text follow.
size_t encode_error_chunk(std::byte* to, const Answered& answered, uint16_t flags, ErrorCode error,
                          uint16_t message_length) noexcept;
// `extents` descriptors follow, of extent_size() each.
size_t encode_status_chunk(std::byte* to, const Answered& answered, uint16_t flags,
                           uint32_t context, uint32_t extents) noexcept;
constexpr size_t extent_size(bool extended) noexcept { return extended ? 16 : 8; }
void encode_extent(std::byte* to, bool extended, uint64_t length, uint32_t status) noexcept;

}  // namespace minivmm::nbd::wire
