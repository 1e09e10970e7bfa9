// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/commands.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::nbd {
namespace {

using wire::Command;
using wire::ErrorCode;

// Below this a READ is not asked for holes: the question costs as much as the data.
constexpr uint32_t kHoleThreshold = 64 << 10;
// Larger ones are as fast with a copy, which stays in the processor's cache.
constexpr uint32_t kMostLent = 64 << 10;
// Bounds for one reply, however fragmented the node is.
constexpr size_t kMaxReadPieces = 64;

void log_failure(const Request& request, const Export& target, const std::string& why) {
  static base::RateLimit limit;
  uint64_t suppressed = 0;
  if (!limit.allow(&suppressed)) return;
  base::log_warning("NBD export '{}': {} of {} bytes at {} failed: {}{}", target.name(),
                    wire::command_name(request.command()), request.head.length, request.head.offset,
                    why, suppressed > 0 ? fmt::format(" ({} similar not shown)", suppressed) : "");
}

// Two codes are answers to a flag of the request; clients expect them for nothing else.
ErrorCode code_for(const Request& request, int err) noexcept {
  const ErrorCode code = wire::error_code(err);
  if (code == ErrorCode::kNotSup && !request.has(wire::kFastZero)) return ErrorCode::kInval;
  if (code == ErrorCode::kOverflow && !request.has(wire::kDf)) return ErrorCode::kInval;
  return code;
}

}  // namespace

bool Commands::asks_for_holes(const Request& request) const noexcept {
  return agreed_.structured() && request.head.length >= kHoleThreshold && !request.has(wire::kDf);
}

bool Commands::borrow(Request& request) noexcept {
  const wire::Request& head = request.head;
  if (request.no_loan || head.length == 0 || head.length > kMostLent || asks_for_holes(request)) {
    return false;
  }
  if (!node().lend(head.offset, head.length, request.loan)) return false;
  request.bare = false;
  reply_data(request, request.loan.data());
  return true;
}

unsigned Commands::run(Request& first) noexcept {
  if (first.next != nullptr) {
    try {
      run_group(first);
      return 0;
    } catch (...) {
      // Which of them it was is found out one by one.
    }
  }
  unsigned failed = 0;
  for (Request* r = &first; r != nullptr; r = r->next) failed += run_one(*r) ? 0 : 1;
  return failed;
}

void Commands::run_group(Request& first) {
  iovec parts[kMaxGroup];
  size_t count = 0;
  uint64_t bytes = 0;
  const bool reads = first.command() == Command::kRead;
  for (Request* r = &first; r != nullptr; r = r->next) {
    if (reads && r->buffer.data() == nullptr) r->buffer = resources_.buffers().take(r->head.length);
    parts[count++] = {reads ? r->buffer.data() : r->payload, r->head.length};
    bytes += r->head.length;
  }
  const base::IoSpan span(parts, count, bytes);
  if (reads) {
    node().read(first.head.offset, span);
  } else {
    node().write(first.head.offset, span, {.fua = first.has(wire::kFua)});
  }
  for (Request* r = &first; r != nullptr; r = r->next) {
    if (reads) {
      reply_data(*r, r->buffer.data());
    } else {
      reply_done(*r);
    }
  }
}

bool Commands::run_one(Request& request) noexcept {
  try {
    dispatch(request);
    return true;
  } catch (...) {
    fail(request, std::current_exception());
    return false;
  }
}

void Commands::fail(Request& request, const std::exception_ptr& error) noexcept {
  const int err = base::errno_of(error);
  // A zeroing that would not be fast is an answer, not a failure.
  const bool expected = err == EOPNOTSUPP && request.has(wire::kFastZero);
  try {
    if (!expected) log_failure(request, *agreed_.target, base::text_of(error));
    // The full text names files of this host: it is for the log.
    fail(request, code_for(request, err),
         fmt::format("{} of {} bytes at {}: {}", wire::command_name(request.command()),
                     request.head.length, request.head.offset, base::errno_text(err)));
  } catch (const std::exception&) {
    fail(request, code_for(request, err), {});
  }
}

void Commands::dispatch(Request& request) {
  const wire::Request& head = request.head;
  const bool fua = request.has(wire::kFua);
  // Ranges of no bytes are valid and do nothing; a node is never asked for them.
  if (head.length == 0 && request.command() != Command::kFlush) {
    if (request.command() == Command::kRead) return reply_data(request, nullptr);
    return reply_done(request);
  }
  switch (request.command()) {
    case Command::kRead:
      if (asks_for_holes(request) && read_with_holes(request)) return;
      return read(request);
    case Command::kWrite:
      node().write(head.offset, base::SingleBuffer(request.payload, head.length), {.fua = fua});
      break;
    case Command::kFlush:
      node().flush();
      break;
    case Command::kTrim:
      node().discard(head.offset, head.length);
      if (fua) node().flush();
      break;
    case Command::kCache:
      node().prefetch(head.offset, head.length);
      break;
    case Command::kWriteZeroes:
      node().write_zeroes(head.offset, head.length,
                          {.fua = fua,
                           .may_unmap = !request.has(wire::kNoHole),
                           .no_fallback = request.has(wire::kFastZero)});
      break;
    case Command::kBlockStatus:
      return block_status(request);
    case Command::kDisc:
      break;
  }
  reply_done(request);
}

void Commands::read(Request& request) {
  if (request.buffer.data() == nullptr) {
    request.buffer = resources_.buffers().take(request.head.length);
  }
  node().read(request.head.offset, base::SingleBuffer(request.buffer.data(), request.head.length));
  reply_data(request, request.buffer.data());
}

void Commands::reply_data(Request& request, const std::byte* data) noexcept {
  const wire::Request& head = request.head;
  Request::Piece& piece = request.reply;
  if (!agreed_.structured()) {
    wire::encode_simple_reply(piece.header.data(), ErrorCode::kNone, head.cookie);
    piece.header_size = wire::kSimpleReplySize;
  } else if (head.length == 0) {
    return reply_done(request);
  } else {
    // The data is here already, so no error can follow it.
    piece.header_size = static_cast<uint32_t>(
        wire::encode_data_chunk(piece.header.data(), answered(request), wire::kChunkDone,
                                head.offset, static_cast<uint32_t>(head.length)));
  }
  piece.data = data;
  piece.data_size = static_cast<uint32_t>(head.length);
  request.rereadable = true;
}

void Commands::reply_done(Request& request) noexcept {
  Request::Piece& piece = request.reply;
  piece.data_size = 0;
  // A READ of nothing is a READ: with structured replies its answer is a chunk.
  const bool chunk = agreed_.extended() || (agreed_.structured() && request.is_read());
  if (!chunk) {
    wire::encode_simple_reply(piece.header.data(), ErrorCode::kNone, request.head.cookie);
    piece.header_size = wire::kSimpleReplySize;
    return;
  }
  piece.header_size = static_cast<uint32_t>(wire::encode_chunk(
      piece.header.data(), answered(request), wire::kChunkDone, wire::ChunkType::kNone, 0));
}

void Commands::fail(Request& request, ErrorCode error, std::string_view reason) noexcept {
  const wire::Request& head = request.head;
  Request::Piece& piece = request.reply;
  request.more.clear();
  request.rereadable = false;
  request.error = error;
  request.bare = false;
  piece.data_size = 0;
  if (!agreed_.structured()) {
    wire::encode_simple_reply(piece.header.data(), error, head.cookie);
    piece.header_size = wire::kSimpleReplySize;
    return;
  }
  const auto length = static_cast<uint16_t>(std::min<size_t>(reason.size(), 1024));
  try {
    if (request.buffer.size() < length) request.buffer = resources_.buffers().take(length);
    if (length > 0) std::memcpy(request.buffer.data(), reason.data(), length);
    piece.data = request.buffer.data();
    piece.data_size = length;
  } catch (const std::bad_alloc&) {
    // The code has to do.
  }
  piece.header_size = static_cast<uint32_t>(
      wire::encode_error_chunk(piece.header.data(), answered(request), wire::kChunkDone, error,
                               static_cast<uint16_t>(piece.data_size)));
}

// Data and holes as separate chunks; holes are neither read nor sent. False: there are none, or
// it cannot be known, and the request is to be read plainly.
bool Commands::read_with_holes(Request& request) {
  const wire::Request& head = request.head;
  struct Part {
    uint64_t offset;
    uint32_t length;
    bool zero;
  };
  std::vector<Part> parts;
  for (uint64_t at = head.offset; at < request.end();) {
    block::BlockStatus status;
    if (parts.size() < kMaxReadPieces) {
      status = node().block_status(at, request.end() - at);
    } else {
      status.length = request.end() - at;  // too fragmented to be worth it: the rest is data
    }
    const auto length = static_cast<uint32_t>(std::min(status.length, request.end() - at));
    if (parts.empty() && !status.zero && length == head.length) return false;
    if (!parts.empty() && parts.back().zero == status.zero) {
      parts.back().length += length;
    } else {
      parts.push_back({at, length, status.zero});
    }
    at += length;
  }
  if (parts.size() == 1 && !parts.front().zero) return false;

  request.more.resize(parts.size() - 1);
  for (size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    Request::Piece& piece = i == 0 ? request.reply : request.more[i - 1];
    const uint16_t done = i + 1 == parts.size() ? wire::kChunkDone : 0;
    if (part.zero) {
      piece.header_size = static_cast<uint32_t>(wire::encode_hole_chunk(
          piece.header.data(), answered(request), done, part.offset, part.length));
      piece.data_size = 0;
      continue;
    }
    if (request.buffer.size() < head.length) {
      request.buffer = resources_.buffers().take(head.length);
    }
    std::byte* const data = request.buffer.data() + (part.offset - head.offset);
    node().read(part.offset, base::SingleBuffer(data, part.length));
    piece.header_size = static_cast<uint32_t>(wire::encode_data_chunk(
        piece.header.data(), answered(request), done, part.offset, part.length));
    piece.data = data;
    piece.data_size = part.length;
  }
  request.rereadable = true;
  return true;
}

// --- replies without their memory ---

bool Commands::shed(Request& request, bool begun) noexcept {
  if (request.loan.data() != nullptr) request.end_loan();
  if (request.bare) return true;
  const auto forget = [&request](Request::Piece& piece) {
    if (piece.data_size == 0) return;
    piece.at = static_cast<size_t>(piece.data - request.buffer.data());
    piece.data = nullptr;
  };
  const bool many_parts = !request.is_read() || !request.more.empty();
  if (request.rereadable && many_parts && !begun) {
    // A table, or a list of parts, that may be longer than what a request may keep.
    request.redo = true;
    request.reply.header_size = request.reply.data_size = 0;
    request.more.clear();
  } else if (request.rereadable) {
    if (!request.is_read()) return false;
    forget(request.reply);
    for (Request::Piece& piece : request.more) forget(piece);
    request.bare = true;
  } else if (request.reply.data_size > 0) {
    if (begun) return false;
    fail(request, request.error, {});  // without its text
  }
  if (request.more.empty()) std::vector<Request::Piece>().swap(request.more);  // its room goes, too
  // To the system: whoever waits for the memory may do so on another loop.
  const base::Pages gone = std::move(request.buffer);
  return true;
}

bool Commands::restore(Request& request, bool begun) noexcept {
  if (std::exchange(request.redo, false)) {
    request.rereadable = false;
    (void)run_one(request);
    return true;
  }
  if (!request.bare) return true;
  const wire::Request& head = request.head;
  try {
    request.buffer = resources_.buffers().take(head.length);
    const auto read = [&](Request::Piece& piece) {
      if (piece.data_size == 0) return;
      std::byte* const data = request.buffer.data() + piece.at;
      node().read(head.offset + piece.at, base::SingleBuffer(data, piece.data_size));
      piece.data = data;
    };
    read(request.reply);
    for (Request::Piece& piece : request.more) read(piece);
    request.bare = false;
    return true;
  } catch (...) {
    fail(request, std::current_exception());
    return !begun;
  }
}

}  // namespace minivmm::nbd
