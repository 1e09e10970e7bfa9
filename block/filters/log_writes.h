// SPDX-License-Identifier: Apache-2.0
// Driver `log-writes` (as QEMU's blklogwrites): records every change and flush on its way to the
// file, in the format of Linux's dm-log-writes, so that every state that a power loss could have
// left can be made again. Options: file, log (children).
//
// The log, all little-endian, in sectors of 512 bytes:
//   sector 0    u64 magic 0x6a736677736872, u64 version 1, u64 number of entries, u32 sector size
//   entry       u64 sector, u64 sectors, u64 flags, u64 length of what follows; one sector
//               followed by the data written (none for a flush, a discard or zeroes)
//   flags       1 flush, 2 FUA, 4 discard; zeroes are recorded as a write of zeroes
//
// Order: a change is recorded when it has completed; a flush when it is asked for. So whatever
// stands before a flush in the log is what that flush makes durable, and no more.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/sync.h"
#include "block/filters/filter_node.h"

namespace minivmm::block {

namespace log_writes {
inline constexpr uint64_t kMagic = 0x6a736677736872;
inline constexpr uint64_t kVersion = 1;
inline constexpr uint32_t kSector = 512;
inline constexpr uint64_t kFlush = 1;
inline constexpr uint64_t kFua = 2;
inline constexpr uint64_t kDiscard = 4;
}  // namespace log_writes

class LogWritesNode final : public FilterNode {
 public:
  LogWritesNode(const NodeConfig& config, std::shared_ptr<Node> file, std::shared_ptr<Node> log);

  std::vector<Edge*> children() override;
  void close() override;

 private:
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override;
  void driver_truncate(uint64_t new_size) override;

  void append(uint64_t offset, uint64_t length, uint64_t flags, IoSpan data);
  void write_super();

  Edge log_;
  std::mutex mutex_;
  uint64_t next_sector_ = 1;  // guarded by mutex_
  uint64_t entries_ = 0;      // guarded by mutex_
  base::FiberMutex super_;    // one writer of the super sector
};

std::shared_ptr<Node> open_log_writes(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
