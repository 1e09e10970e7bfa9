// SPDX-License-Identifier: Apache-2.0
#include "block/filters/log_writes.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/bytes.h"
#include "base/checked.h"
#include "base/error.h"
#include "block/graph/opening.h"

namespace minivmm::block {

using log_writes::kSector;

LogWritesNode::LogWritesNode(const NodeConfig& config, std::shared_ptr<Node> file,
                             std::shared_ptr<Node> log)
    : FilterNode(config, "log-writes", std::move(file)),
      log_(std::move(log), fmt::format("log of '{}'", config.node_name),
           Permissions::format_file(true)) {
  // Whole sectors: the unit that a disk writes or does not write.
  Limits limits = this->file().node().limits();
  limits.request_alignment = std::max(limits.request_alignment, kSector);
  set_limits(limits);
  write_super();
}

std::vector<Edge*> LogWritesNode::children() { return {&file(), &log_}; }

void LogWritesNode::write_super() {
  const std::lock_guard only_one(super_);
  std::byte sector[kSector] = {};
  base::store_le<uint64_t>(sector, log_writes::kMagic);
  base::store_le<uint64_t>(sector + 8, log_writes::kVersion);
  {
    const std::lock_guard lock(mutex_);
    base::store_le<uint64_t>(sector + 16, entries_);
  }
  base::store_le<uint32_t>(sector + 24, kSector);
  log_.write(0, base::SingleBuffer(sector, sizeof sector));
}

void LogWritesNode::append(uint64_t offset, uint64_t length, uint64_t flags, IoSpan data) {
  std::byte head[kSector] = {};
  base::store_le<uint64_t>(head, offset / kSector);
  base::store_le<uint64_t>(head + 8, length / kSector);
  base::store_le<uint64_t>(head + 16, flags);
  base::store_le<uint64_t>(head + 24, data.bytes());
  uint64_t sector = 0;
  {
    const std::lock_guard lock(mutex_);
    sector = next_sector_;
    next_sector_ += 1 + base::div_ceil<uint64_t>(data.bytes(), kSector);
    ++entries_;
  }
  base::IoList list;
  list.add(head, sizeof head);
  list.add(data);
  log_.write(sector * kSector, list);
}

void LogWritesNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  // One stable copy: the buffers may be a guest's, and log and file must agree.
  base::Buffer copy(from.bytes());
  base::copy_from(from, 0, copy.span());
  FilterNode::driver_write(offset, copy.io(), flags);
  append(offset, copy.size(), flags.fua ? log_writes::kFua : 0U, copy.io());
}

void LogWritesNode::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  FilterNode::driver_write_zeroes(offset, length, flags);
  constexpr uint64_t kPiece = 1 << 20;
  base::Buffer zeroes = base::Buffer::zeroed(std::min(length, kPiece));
  for (uint64_t done = 0; done < length; done += kPiece) {
    const uint64_t piece = std::min(kPiece, length - done);
    append(offset + done, piece, flags.fua ? log_writes::kFua : 0U,
           base::SingleBuffer(zeroes.data(), piece));
  }
}

void LogWritesNode::driver_discard(uint64_t offset, uint64_t length) {
  FilterNode::driver_discard(offset, length);
  append(offset, length, log_writes::kDiscard, {});
}

void LogWritesNode::driver_flush() {
  append(0, 0, log_writes::kFlush, {});
  write_super();  // a process that is killed leaves a log that says how much it holds
  file().flush();
}

void LogWritesNode::driver_truncate(uint64_t new_size) {
  if (new_size < size()) {
    throw base::Error(ENOTSUP, fmt::format("{}: shrinking cannot be recorded", describe()));
  }
  FilterNode::driver_truncate(new_size);
}

void LogWritesNode::close() {
  write_super();
  log_.flush();
}

std::shared_ptr<Node> open_log_writes(Opening& opening, const NodeConfig& config,
                                      Options& options) {
  auto file = opening.open_child(options, "file", config.read_only);
  auto log = opening.open_child(options, "log", false);
  return std::make_shared<LogWritesNode>(config, std::move(file), std::move(log));
}

}  // namespace minivmm::block
