// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/file.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>

#include <fmt/core.h>
#include <limits.h>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/error.h"
#include "base/event_loop.h"
#include "base/io.h"
#include "base/log.h"
#include "base/pool.h"
#include "block/graph/edge.h"
#include "block/graph/loan.h"

namespace minivmm::block {

using base::Error;
using base::IoList;

namespace {

// A larger write is worth a kernel thread of its own: copying it would hold the loop up.
constexpr uint64_t kMaxInlineWrite = 512 * 1024;
// The loop's other fibers get their turn after so much of a cached read.
constexpr uint64_t kMaxInlineRead = 1 << 20;

bool is_in_memory(int fd) noexcept {
  struct statfs system {};
  return ::fstatfs(fd, &system) == 0 &&
         (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
}

}  // namespace

FileNode::FileNode(const NodeConfig& config, std::shared_ptr<HostFile> file, bool no_flush)
    : Node(config.node_name, file->is_device() ? "host_device" : "file", config.read_only),
      file_(std::move(file)),
      no_flush_(no_flush),
      in_memory_(is_in_memory(file_->fd())) {
  set_size(file_->query_size());
  set_limits({.request_alignment = file_->offset_alignment(),
              .optimal_io = 4096,
              .discard_granularity = file_->is_device() ? 512U : 4096U,
              .can_discard = true,
              .can_write_zeroes = true});
}

void FileNode::fail(int64_t result, const char* what, uint64_t offset, uint64_t length) const {
  throw base::errno_error(
      static_cast<int>(-result),
      fmt::format("{}: {} of {} bytes at {}", file_->filename(), what, length, offset));
}

bool FileNode::memory_is_aligned(IoSpan span) const noexcept {
  const uintptr_t mask = file_->memory_alignment() - 1;
  const uintptr_t length_mask = file_->offset_alignment() - 1;
  for (const iovec& v : span.list()) {
    if ((reinterpret_cast<uintptr_t>(v.iov_base) & mask) != 0) return false;
    if ((v.iov_len & length_mask) != 0) return false;
  }
  return true;
}

// Bytes that were in the page cache; 0: ask the ring.
int64_t FileNode::read_inline(IoSpan to, uint64_t offset) noexcept {
  if (!nowait_reads_.load(std::memory_order_relaxed)) return 0;
  const auto count = static_cast<int>(std::min<size_t>(to.count(), IOV_MAX));
  const int flags = in_memory_ ? 0 : RWF_NOWAIT;
  const ssize_t n = ::preadv2(file_->fd(), to.data(), count, static_cast<off_t>(offset), flags);
  if (n >= 0) return n;
  if (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL) {
    nowait_reads_.store(false, std::memory_order_relaxed);
  }
  return 0;
}

void FileNode::driver_read(uint64_t offset, IoSpan to) {
  if (!file_->direct()) [[likely]] {
    if (to.bytes() <= kMaxInlineRead) [[likely]] {
      read_buffered(offset, to);
    } else {
      read_in_turns(offset, to);
    }
    return;
  }
  if (memory_is_aligned(to)) {
    read_rest(offset, to, 0);
    return;
  }
  base::Buffer bounce(to.bytes());
  read_rest(offset, bounce.io(), 0);
  base::copy_to(to, 0, bounce.span());
}

void FileNode::read_buffered(uint64_t offset, IoSpan to) {
  const auto done = static_cast<uint64_t>(read_inline(to, offset));
  if (done != to.bytes()) [[unlikely]]
    read_rest(offset, to, done);
}

void FileNode::read_in_turns(uint64_t offset, IoSpan to) {
  for (uint64_t done = 0; done < to.bytes(); done += kMaxInlineRead) {
    if (done > 0) base::EventLoop::current()->yield();
    IoList piece;
    read_buffered(offset + done,
                  base::slice(to, done, std::min(kMaxInlineRead, to.bytes() - done), piece));
  }
}

void FileNode::read_rest(uint64_t offset, IoSpan to, uint64_t done) {
  IoList rest;
  const IoSpan left = base::slice(to, done, to.bytes() - done, rest);
  const int64_t n = base::io::read_at(file_->fd(), left, offset + done);
  if (n < 0) fail(n, "read", offset, to.bytes());
  // Short: the file ends inside our last, padded block, or was cut behind our back. A hole then.
  base::fill_zero(left, static_cast<uint64_t>(n), left.bytes() - static_cast<uint64_t>(n));
}

int64_t FileNode::write_inline(IoSpan from, uint64_t offset) noexcept {
  const auto count = static_cast<int>(std::min<size_t>(from.count(), IOV_MAX));
  const Breaker::Call call(inline_writes_);
  const ssize_t n = ::pwritev(file_->fd(), from.data(), count, static_cast<off_t>(offset));
  return n < 0 ? -errno : n;
}

void FileNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  const bool durable = flags.fua && !no_flush_;
  if (file_->direct() && !memory_is_aligned(from)) {
    base::Buffer bounce(from.bytes());
    base::copy_from(from, 0, bounce.span());
    write_rest(offset, bounce.io(), 0);
  } else if (!file_->direct() && from.bytes() <= kMaxInlineWrite &&
             inline_writes_.allows_inline()) {
    const int64_t n = write_inline(from, offset);
    if (n < 0 && n != -EINTR) fail(n, "write", offset, from.bytes());
    const uint64_t done = n < 0 ? 0 : static_cast<uint64_t>(n);
    if (done != from.bytes()) write_rest(offset, from, done);
  } else {
    write_rest(offset, from, 0);
  }
  grow_size(offset + from.bytes());
  if (durable) driver_flush();
}

void FileNode::write_rest(uint64_t offset, IoSpan from, uint64_t done) {
  IoList rest;
  const IoSpan left = base::slice(from, done, from.bytes() - done, rest);
  const int64_t n = base::io::write_at(file_->fd(), left, offset + done);
  if (n < 0) fail(n, "write", offset, from.bytes());
  if (static_cast<uint64_t>(n) != left.bytes()) fail(-ENOSPC, "write", offset, from.bytes());
}

void FileNode::driver_flush() {
  if (no_flush_) return;
  const int latched = file_->failed_sync.load(std::memory_order_acquire);
  if (latched != 0) {
    throw Error(latched, fmt::format("{}: an earlier flush failed ({}), so what was written "
                                     "before it may be lost; reopen the image and check it",
                                     file_->filename(), base::errno_text(latched)));
  }
  const int64_t result = base::io::fsync(file_->fd(), true);
  if (result == 0) return;
  file_->failed_sync.store(static_cast<int>(-result), std::memory_order_release);
  throw base::errno_error(static_cast<int>(-result), fmt::format("{}: flush", file_->filename()));
}

// False: the file system lacks this; remembered in `supported`.
bool FileNode::fallocate(int mode, uint64_t offset, uint64_t length, std::atomic<bool>& supported,
                         const char* what) {
  if (!supported.load(std::memory_order_relaxed)) return false;
  const int64_t result = base::io::fallocate(file_->fd(), mode, offset, length);
  if (result == 0) return true;
  if (result == -EOPNOTSUPP || result == -ENOSYS || result == -ENODEV) {
    supported.store(false, std::memory_order_relaxed);
    return false;
  }
  // Block devices refuse ranges that are not whole sectors.
  if (result == -EINVAL && file_->is_device()) return false;
  fail(result, what, offset, length);
}

void FileNode::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  constexpr int kPunch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
  const uint64_t end = offset + length;
  // A file is made longer by the zeroing itself: ftruncate could come after a write further on and
  // cut that off. (Punching a hole cannot make it longer.)
  const bool grows = !file_->is_device() && end > size();
  const int zero = FALLOC_FL_ZERO_RANGE | (grows ? 0 : FALLOC_FL_KEEP_SIZE);
  bool done =
      !grows && flags.may_unmap && fallocate(kPunch, offset, length, can_punch_, "write zeroes");
  done = done || fallocate(zero, offset, length, can_zero_, "write zeroes");
  if (!done) throw Error(ENOTSUP, "write zeroes: the file system has no way to do it");
  if (grows) grow_size(end);
  if (flags.fua) driver_flush();
}

void FileNode::driver_discard(uint64_t offset, uint64_t length) {
  (void)fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length, can_punch_,
                  "discard");
}

BlockStatus FileNode::driver_block_status(uint64_t offset, uint64_t length) {
  if (file_->is_device()) {
    BlockStatus status{.length = length, .data = true, .allocated = true};
    status.host_offset = offset;
    return status;
  }
  // Cheap while the file's extents are known to the kernel; a call that must read them blocks.
  if (!inline_seeks_.allows_inline()) {
    return base::Pool::syscalls().run([&] { return seek_status(offset, length); });
  }
  const Breaker::Call call(inline_seeks_);
  return seek_status(offset, length);
}

BlockStatus FileNode::seek_status(uint64_t offset, uint64_t length) const noexcept {
  BlockStatus status{.length = length, .data = true, .allocated = true};
  status.host_offset = offset;
  const auto at = static_cast<off_t>(offset);
  const off_t data = ::lseek(file_->fd(), at, SEEK_DATA);
  if (data < 0 && errno != ENXIO) return status;
  if (data != at) {  // a hole; without any data behind it, up to the end
    status.data = false;
    status.zero = true;
    if (data > at) status.length = std::min<uint64_t>(length, static_cast<uint64_t>(data - at));
    return status;
  }
  const off_t hole = ::lseek(file_->fd(), at, SEEK_HOLE);
  if (hole > at) status.length = std::min<uint64_t>(length, static_cast<uint64_t>(hole - at));
  return status;
}

void FileNode::driver_truncate(uint64_t new_size) {
  if (file_->is_device()) {
    throw Error(ENOTSUP, fmt::format("{}: a device cannot be resized", file_->filename()));
  }
  const int fd = file_->fd();
  const int err = base::Pool::syscalls().run(
      [=] { return ::ftruncate(fd, static_cast<off_t>(new_size)) == 0 ? 0 : errno; });
  if (err != 0) fail(-err, "resize", 0, new_size);
  set_size(new_size);
}

void FileNode::driver_copy_range(uint64_t offset, uint64_t length, Edge& from,
                                 uint64_t from_offset) {
  uint64_t at = offset;
  from.copy_out(from_offset, length, [&](Node& node, uint64_t piece, uint64_t bytes) {
    copy_from(node, piece, at, bytes);
    at += bytes;
  });
  grow_size(offset + length);
}

void FileNode::copy_from(Node& node, uint64_t from_offset, uint64_t offset, uint64_t length) {
  auto* source = dynamic_cast<FileNode*>(&node);
  if (source == nullptr || file_->direct() || source->file_->direct()) {
    throw Error(ENOTSUP, "copy range: not between these nodes");
  }
  const int in = source->file_->fd();
  const int out = file_->fd();
  auto in_at = static_cast<off_t>(from_offset);
  auto out_at = static_cast<off_t>(offset);
  const int err = base::Pool::syscalls().run([&]() -> int {
    uint64_t left = length;
    while (left > 0) {
      const ssize_t n = ::copy_file_range(in, &in_at, out, &out_at, left, 0);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return errno == EXDEV || errno == EINVAL || errno == ENOSYS ? ENOTSUP : errno;
      if (n == 0) return ENOTSUP;  // the source ends early: reading gives the zeroes
      left -= static_cast<uint64_t>(n);
    }
    return 0;
  });
  if (err == ENOTSUP) throw Error(ENOTSUP, "copy range: not between these files");
  if (err != 0) fail(-err, "copy", offset, length);
}

bool FileNode::driver_lend(uint64_t offset, uint64_t length, Loan& to) noexcept {
  CachedPages* const cached = file_->cached_pages();
  if (cached == nullptr) return false;
  to.lend(cached->find(offset, length));
  return to.data() != nullptr;
}

void FileNode::driver_prefetch(uint64_t offset, uint64_t length) {
  (void)::posix_fadvise(file_->fd(), static_cast<off_t>(offset), static_cast<off_t>(length),
                        POSIX_FADV_WILLNEED);
}

// By a thread of the pool: the call waits where the device's queue is full.
void FileNode::driver_start_writeback(uint64_t offset, uint64_t length) noexcept {
  if (no_flush_ || file_->direct() || writing_back_.exchange(true)) return;
  background_.add();
  const auto ended = [this] {
    writing_back_.store(false);
    background_.done();
  };
  try {
    base::EventLoop::current()->spawn(
        "write back", [this, offset, length, ended, self = shared_from_this()] {
          base::Pool::syscalls().run([&] {
            // It is only begun; what goes wrong is the next flush's to say.
            (void)::sync_file_range(file_->fd(), static_cast<off_t>(offset),
                                    static_cast<off_t>(length), SYNC_FILE_RANGE_WRITE);
          });
          ended();
        });
  } catch (const std::exception&) {
    ended();
  }
}

void FileNode::close() {
  background_.wait();
  if (!read_only()) driver_flush();
}

Facts FileNode::facts() const {
  Facts facts;
  struct stat info {};
  if (::fstat(file_->fd(), &info) == 0) {
    facts.emplace_back("actual-size", static_cast<uint64_t>(info.st_blocks) * 512);
  }
  facts.emplace_back("direct", file_->direct());
  return facts;
}

std::shared_ptr<Node> open_file(Opening&, const NodeConfig& config, Options& options) {
  HostFileOptions host;
  host.opener = fmt::format("node '{}'", config.node_name);
  host.writable = !config.read_only;
  if (auto fd = options.take_string("fd")) {
    Options number;
    number.set("fd", *fd);
    host.fd = static_cast<int>(number.take_uint("fd", 0, 0, INT_MAX));
  } else {
    host.filename = options.require_string("filename");
    host.inode = options.take_string("inode").value_or("");
  }
  host.direct = options.take_bool("cache.direct", false);
  const bool no_flush = options.take_bool("cache.no-flush", false);
  host.locking = static_cast<Locking>(options.take_choice("locking", {"auto", "on", "off"}, 0));
  // Also once the threads of the loops and of the other pools open nothing any more.
  auto file = base::Pool::errands().run([&] { return HostFile::open(host); });
  return std::make_shared<FileNode>(config, std::move(file), no_flush);
}

}  // namespace minivmm::block
