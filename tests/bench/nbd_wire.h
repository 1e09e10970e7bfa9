// SPDX-License-Identifier: Apache-2.0
// What the load generator and the bare server need of the NBD protocol. It is kept apart from the
// server's own wire code on purpose: a tool that shares code with what it measures shares its
// mistakes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bytes.h"

namespace minivmm::bench {

constexpr std::uint64_t kNbdMagic = 0x4e42444d41474943U;  // "NBDMAGIC"
constexpr std::uint64_t kIHaveOpt = 0x49484156454f5054U;  // "IHAVEOPT"
constexpr std::uint64_t kOptReplyMagic = 0x0003e889045565a9U;
constexpr std::uint32_t kRequestMagic = 0x25609513U;
constexpr std::uint32_t kSimpleReplyMagic = 0x67446698U;
constexpr std::uint32_t kStructuredReplyMagic = 0x668e33efU;

constexpr std::uint16_t kFlagFixedNewstyle = 1;
constexpr std::uint16_t kFlagNoZeroes = 2;

constexpr std::uint32_t kOptExportName = 1;
constexpr std::uint32_t kOptAbort = 2;
constexpr std::uint32_t kOptGo = 7;
constexpr std::uint32_t kOptStructuredReply = 8;

constexpr std::uint32_t kRepAck = 1;
constexpr std::uint32_t kRepInfo = 3;
constexpr std::uint32_t kRepErrorBit = 1U << 31;
constexpr std::uint32_t kRepErrUnsup = kRepErrorBit | 1;
constexpr std::uint16_t kInfoExport = 0;

constexpr std::uint16_t kTransmitHasFlags = 1;
constexpr std::uint16_t kTransmitReadOnly = 2;
constexpr std::uint16_t kTransmitFlush = 4;
constexpr std::uint16_t kTransmitMultiConn = 1U << 8;

constexpr std::uint16_t kCmdRead = 0;
constexpr std::uint16_t kCmdWrite = 1;
constexpr std::uint16_t kCmdDisc = 2;
constexpr std::uint16_t kCmdFlush = 3;

constexpr std::uint16_t kChunkDone = 1;
constexpr std::uint16_t kChunkNone = 0;
constexpr std::uint16_t kChunkOffsetData = 1;
constexpr std::uint16_t kChunkOffsetHole = 2;
constexpr std::uint16_t kChunkErrorBit = 1U << 15;

constexpr std::size_t kRequestSize = 28;
constexpr std::size_t kSimpleReplySize = 16;
constexpr std::size_t kChunkHeaderSize = 20;

struct NbdRequest {
  std::uint16_t flags = 0;
  std::uint16_t type = 0;
  std::uint64_t cookie = 0;
  std::uint64_t offset = 0;
  std::uint32_t length = 0;
};

inline void encode_request(char* p, const NbdRequest& r) {
  base::store_be<std::uint32_t>(p, kRequestMagic);
  base::store_be<std::uint16_t>(p + 4, r.flags);
  base::store_be<std::uint16_t>(p + 6, r.type);
  base::store_be<std::uint64_t>(p + 8, r.cookie);
  base::store_be<std::uint64_t>(p + 16, r.offset);
  base::store_be<std::uint32_t>(p + 24, r.length);
}

inline bool decode_request(const char* p, NbdRequest& r) {
  r.flags = base::load_be<std::uint16_t>(p + 4);
  r.type = base::load_be<std::uint16_t>(p + 6);
  r.cookie = base::load_be<std::uint64_t>(p + 8);
  r.offset = base::load_be<std::uint64_t>(p + 16);
  r.length = base::load_be<std::uint32_t>(p + 24);
  return base::load_be<std::uint32_t>(p) == kRequestMagic;
}

inline void encode_simple_reply(char* p, std::uint32_t error, std::uint64_t cookie) {
  base::store_be<std::uint32_t>(p, kSimpleReplyMagic);
  base::store_be<std::uint32_t>(p + 4, error);
  base::store_be<std::uint64_t>(p + 8, cookie);
}

}  // namespace minivmm::bench
