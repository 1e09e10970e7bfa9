// SPDX-License-Identifier: Apache-2.0
// Driver `file` (alias `host_device`): a regular file or a block device of this host.
//
// Options: filename or fd (a number), inode (DEVICE:INODE that the file has to be), cache.direct,
// cache.no-flush, locking=auto|on|off.
//
// How a request is done was chosen by measurement (buffered, page-cached, ext4): a 4 KiB pread
// costs 0.65 us inline and 0.8 to 1.0 us through the ring, a pwrite 2.1 us inline and 4 to 64 us
// through the ring, which hands buffered writes to a kernel thread. So buffered requests are tried
// inline first: reads with RWF_NOWAIT, which fails rather than waits (plainly on tmpfs, which does
// not know that and has nothing to wait for), writes plainly, with a
// breaker that sends them through the ring for a while after one that blocked. O_DIRECT goes
// through the ring.
#pragma once

#include <string>

#include <atomic>
#include <memory>

#include "base/sync.h"
#include "block/graph/driver.h"
#include "block/graph/node.h"
#include "block/protocols/breaker.h"
#include "block/protocols/host_file.h"

namespace minivmm::block {

class FileNode final : public Node {
 public:
  FileNode(const NodeConfig& config, std::shared_ptr<HostFile> file, bool no_flush);

  std::string filename() const override { return file_->filename(); }
  Facts facts() const override;
  void close() override;

 private:
  void driver_read(uint64_t offset, IoSpan to) override;
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;
  void driver_flush() override;
  BlockStatus driver_block_status(uint64_t offset, uint64_t length) override;
  void driver_truncate(uint64_t new_size) override;
  // From files of this host: by copy_file_range, which shares blocks where the file system does.
  void driver_copy_range(uint64_t offset, uint64_t length, Edge& from,
                         uint64_t from_offset) override;
  bool driver_lend(uint64_t offset, uint64_t length, Loan& to) noexcept override;
  void driver_prefetch(uint64_t offset, uint64_t length) override;
  void driver_start_writeback(uint64_t offset, uint64_t length) noexcept override;

  [[noreturn]] void fail(int64_t result, const char* what, uint64_t offset, uint64_t length) const;
  int64_t read_inline(IoSpan to, uint64_t offset) noexcept;
  int64_t write_inline(IoSpan from, uint64_t offset) noexcept;
  void read_buffered(uint64_t offset, IoSpan to);
  void read_in_turns(uint64_t offset, IoSpan to);
  void read_rest(uint64_t offset, IoSpan to, uint64_t done);
  void write_rest(uint64_t offset, IoSpan from, uint64_t done);
  BlockStatus seek_status(uint64_t offset, uint64_t length) const noexcept;
  bool memory_is_aligned(IoSpan span) const noexcept;
  void copy_from(Node& node, uint64_t from_offset, uint64_t offset, uint64_t length);
  bool fallocate(int mode, uint64_t offset, uint64_t length, std::atomic<bool>& supported,
                 const char* what);

  const std::shared_ptr<HostFile> file_;
  const bool no_flush_;
  const bool in_memory_;  // its file system has no disk: reads wait for none
  // What the file system turned out not to have.
  std::atomic<bool> nowait_reads_{true};
  std::atomic<bool> can_punch_{true};
  std::atomic<bool> can_zero_{true};
  Breaker inline_writes_;
  Breaker inline_seeks_;
  std::atomic<bool> writing_back_{false};
  base::WaitGroup background_;
};

std::shared_ptr<Node> open_file(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
