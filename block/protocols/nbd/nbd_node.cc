// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/nbd_node.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <new>
#include <utility>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/log.h"
#include "block/graph/opening.h"

namespace minivmm::block {
namespace {

using base::Error;
using Kind = NbdCommand::Kind;

// What a READ or WRITE brings where the server does not say: every server takes that.
constexpr uint32_t kDefaultMaximum = 32u << 20;
// Of the block size below which a server takes no request.
constexpr uint32_t kLargestMinimum = 64u << 10;
// Ranges without data: lengths are 32 bits, and this is a whole number of every block.
constexpr uint64_t kMaxRange = uint64_t{1} << 30;

Limits limits_of(const NbdExport& info) {
  // Who does not tell takes sectors, but for a size that is none.
  uint32_t minimum = info.minimum_block;
  if (minimum == 0) minimum = info.size % 512 == 0 ? 512 : 1;
  if (!std::has_single_bit(minimum)) minimum = 1;
  const uint32_t maximum = info.maximum_block == 0 ? kDefaultMaximum : info.maximum_block;
  Limits out;
  out.request_alignment = minimum;
  out.max_transfer = base::align_down<uint64_t>(
      std::clamp(maximum, minimum, std::max(minimum, kDefaultMaximum)), minimum);
  out.optimal_io = info.preferred_block;
  out.discard_granularity = minimum;
  out.can_discard = info.trim;
  out.can_write_zeroes = info.zero;
  return out;
}

}  // namespace

NbdNode::NbdNode(const NodeConfig& config, std::shared_ptr<NbdPool> pool)
    : Node(config.node_name, "nbd", config.read_only),
      pool_(std::move(pool)),
      info_(pool_->info()) {
  set_size(info_.size);
  set_limits(limits_of(info_));
}

Facts NbdNode::facts() const {
  return {{"uri", pool_->target().uri.text()},
          {"protocol", info_.protocol},
          {"tls", info_.tls},
          {"connections", uint64_t{pool_->connections()}},
          {"reconnects", pool_->reconnects()}};
}

void NbdNode::close() {
  std::exception_ptr error;
  const uint64_t unflushed = acknowledged_ - flushed_;
  try {
    if (unflushed > 0) driver_flush();
  } catch (const Error& e) {
    error = std::make_exception_ptr(
        Error(e.err(), fmt::format("{}; {} bytes that the server acknowledged were not flushed: "
                                   "should it fail now, they are lost",
                                   e.what(), unflushed)));
  }
  pool_->close();
  if (error) std::rethrow_exception(error);
}

void NbdNode::run(NbdCommand& command, const char* what) {
  const int err = pool_->run(command);
  if (err == 0) return;
  throw base::errno_error(err, fmt::format("{}: {} of {} bytes at {}", pool_->target().uri.text(),
                                           what, command.length, command.offset));
}

void NbdNode::driver_read(uint64_t offset, IoSpan to) {
  NbdCommand command{.kind = Kind::kRead, .offset = offset, .length = to.bytes()};
  if (to.count() == 1) {
    command.data = to.data()->iov_base;
    return run(command, "read");
  }
  base::Buffer whole(to.bytes());
  command.data = whole.data();
  run(command, "read");
  base::copy_to(to, 0, whole.span());
}

void NbdNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  NbdCommand command{.kind = Kind::kWrite, .offset = offset, .length = from.bytes()};
  if (flags.fua && info_.fua) command.flags |= LIBNBD_CMD_FLAG_FUA;
  base::Buffer copy;
  if (from.count() == 1 && !pool_->keeps_unflushed()) {
    command.data = from.data()->iov_base;
  } else {
    copy = base::Buffer(from.bytes());
    base::copy_from(from, 0, copy.span());
    command.data = copy.data();
  }
  change(command, "write", std::move(copy), flags.fua);
}

void NbdNode::change(NbdCommand& command, const char* what, base::Buffer data, bool fua) {
  const bool durable = fua && (command.flags & LIBNBD_CMD_FLAG_FUA) != 0;
  UnflushedLog::Records record;
  // One that is durable, too, behind others that are not: they are done again, and would be the
  // newer ones then.
  if (pool_->keeps_unflushed() && (!durable || !pool_->unflushed().empty())) {
    record = UnflushedLog::prepare(command, std::move(data));
    command.unflushed = &pool_->unflushed();
    command.record = &record;
  }
  // `data` or the record holds the bytes until the server has answered.
  const std::shared_ptr<UnflushedLog::Record> kept = record.empty() ? nullptr : record.front();
  run(command, what);
  if (!durable) acknowledged_ += command.length;
  if ((fua && !durable) || pool_->unflushed().bytes() > kMaxUnflushed) driver_flush();
}

void NbdNode::change_range(Kind kind, uint64_t offset, uint64_t length, uint32_t flags,
                           const char* what, bool fua) {
  if (fua && info_.fua) flags |= LIBNBD_CMD_FLAG_FUA;
  for (const uint64_t end = offset + length; offset < end;) {
    NbdCommand command{.kind = kind,
                       .offset = offset,
                       .length = std::min(end - offset, kMaxRange),
                       .flags = flags};
    change(command, what, {}, fua);
    offset += command.length;
  }
}

void NbdNode::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  if (!info_.zero || (flags.no_fallback && !info_.fast_zero)) {
    throw Error(ENOTSUP, "write zeroes: the NBD server has no way to do it fast");
  }
  uint32_t wire = 0;
  if (!flags.may_unmap) wire |= LIBNBD_CMD_FLAG_NO_HOLE;
  if (flags.no_fallback) wire |= LIBNBD_CMD_FLAG_FAST_ZERO;
  change_range(Kind::kZero, offset, length, wire, "write zeroes", flags.fua);
}

void NbdNode::driver_discard(uint64_t offset, uint64_t length) {
  if (info_.trim) change_range(Kind::kTrim, offset, length, 0, "discard", false);
}

void NbdNode::driver_flush() {
  if (!info_.flush) return;
  const uint64_t mark = pool_->unflushed().mark();
  const uint64_t covered = acknowledged_;
  NbdCommand command{.kind = Kind::kFlush};
  run(command, "flush");
  pool_->unflushed().flushed(mark);
  for (uint64_t before = flushed_; before < covered;) {
    if (flushed_.compare_exchange_weak(before, covered)) break;
  }
}

BlockStatus NbdNode::driver_block_status(uint64_t offset, uint64_t length) {
  BlockStatus out{.length = length, .data = true, .allocated = true};
  out.host_offset = offset;
  if (!info_.allocation) return out;
  NbdCommand command{
      .kind = Kind::kStatus, .offset = offset, .length = std::min(length, kMaxRange)};
  run(command, "block status");
  if (command.status_length == 0) {
    throw Error(EIO, fmt::format("{}: the server answers a question for extents with none",
                                 pool_->target().uri.text()));
  }
  out.length = command.status_length;
  constexpr uint32_t kHole = 1;
  constexpr uint32_t kZero = 2;
  out.zero = (command.status_flags & kZero) != 0;
  // What reads as neither stored data nor zeroes is read to be sure.
  out.data = (command.status_flags & kHole) == 0 || !out.zero;
  return out;
}

void NbdNode::driver_prefetch(uint64_t offset, uint64_t length) {
  if (!info_.cache) return;
  NbdCommand command{.kind = Kind::kCache, .offset = offset, .length = std::min(length, kMaxRange)};
  run(command, "prefetch");
}

namespace {

void check_usable(const NbdPool& pool) {
  const NbdExport& info = pool.info();
  const std::string uri = pool.target().uri.text();
  if (info.size > kMaxDiskSize) {
    throw Error(EFBIG, fmt::format("{}: {} bytes is larger than any disk may be", uri, info.size));
  }
  if (info.minimum_block > kLargestMinimum) {
    throw Error(ENOTSUP, fmt::format("{}: the server's smallest block has {} bytes; the protocol "
                                     "allows {}",
                                     uri, info.minimum_block, kLargestMinimum));
  }
}

}  // namespace

std::shared_ptr<Node> open_nbd(Opening& opening, const NodeConfig& config, Options& options) {
  // Meant for files: a server has a cache of its own.
  (void)options.take_bool("cache.direct", false);
  (void)options.take_bool("cache.no-flush", false);
  const auto pool = std::make_shared<NbdPool>(take_nbd_target(options));
  opening.when_given_up([pool](const std::string& why) { pool->give_up(why); });
  pool->open();
  try {
    check_usable(*pool);
    if (pool->info().read_only && !config.read_only) {
      throw Error(EROFS, fmt::format("{}: the server allows reading only: open it with "
                                     "read-only=on",
                                     pool->target().uri.text()));
    }
    return std::make_shared<NbdNode>(config, pool);
  } catch (...) {
    pool->close();
    throw;
  }
}

}  // namespace minivmm::block
