// SPDX-License-Identifier: Apache-2.0
// One file of a mount: a block graph handle with the meaning that file operations have on it.
// Owned by the FileTable. Requests run on fibers, on any loop, many at once; each throws
// base::Error.
#pragma once

#include <string>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>

#include "base/epoch.h"
#include "base/timer_queue.h"
#include "block/graph/handle.h"

namespace minivmm::fuse {

class Invalidator;

class File {
 public:
  File(uint64_t inode, std::string name, block::Handle handle, bool writable);
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File();

  uint64_t inode() const noexcept { return inode_; }
  const std::string& name() const noexcept { return name_; }
  bool writable() const noexcept { return writable_; }
  // On a loop's thread. What it last was, once the file is removed.
  uint64_t size() noexcept;
  // Time of the last change through this mount (or of its making), ns since the epoch.
  int64_t changed_ns() const noexcept { return changed_ns_.load(std::memory_order_relaxed); }

  // Bytes read: fewer than asked only at the end of the disk.
  size_t read(uint64_t offset, std::span<std::byte> to);
  // Bytes written: fewer than given only at the end of the disk; ENOSPC if it would be none.
  // `durable`: as O_SYNC asks.
  size_t write(uint64_t offset, std::span<const std::byte> from, bool durable);
  void flush();
  // fallocate(2): punching and zeroing are cut at the end of the disk where the mode keeps the
  // size and refused (ENOSPC) where it would grow; plain allocation is checked and changes nothing.
  void allocate(int mode, uint64_t offset, uint64_t length);
  // lseek(2) with SEEK_DATA or SEEK_HOLE. ENXIO at or after the end.
  uint64_t seek(uint64_t offset, int whence);

  // Pages of the file are about to be in the kernel's cache, which it must hear of changes by
  // others for: called before what goes there is read.
  void keep_cache_true(const std::shared_ptr<Invalidator>& invalidator);
  // Nobody has it open: what is cached is dropped at the next opening.
  void forget_cache() noexcept;

  // Fails requests from now on (ENODEV) and waits for those in flight; false: some still run at
  // the deadline.
  bool shut(base::Clock::time_point deadline);
  // Once shut() has returned true. Flushes; throws the flush's error.
  void close();

  // Any thread, under the FileTable's lock.
  std::string describe() const;
  void count_error() noexcept { errors_.fetch_add(1, std::memory_order_relaxed); }

  // How many times it is open. Guarded by the FileTable.
  uint64_t opens = 0;

 private:
  class Use;
  class CacheWatcher;
  uint64_t zeroable_end(int mode, uint64_t offset, uint64_t length) const;
  void changed() noexcept;

  const uint64_t inode_;
  const std::string name_;
  const bool writable_;
  block::Handle handle_;
  base::Epoch requests_;
  std::atomic<bool> shut_{false};
  std::atomic<uint64_t> last_size_;            // for those that may not touch handle_
  std::atomic<CacheWatcher*> cache_{nullptr};  // cache_owner_'s, once there is one
  std::mutex cache_mutex_;                     // guards cache_owner_
  std::shared_ptr<CacheWatcher> cache_owner_;
  std::atomic<int64_t> changed_ns_;
  std::atomic<uint64_t> errors_{0};
};

}  // namespace minivmm::fuse
