// SPDX-License-Identifier: Apache-2.0
#include "fuse/file.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>

#include <fmt/core.h>

#include "base/error.h"
#include "fuse/invalidator.h"

namespace minivmm::fuse {
namespace {

using base::Error;

int64_t now_ns() noexcept {
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME_COARSE, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

// A request's stay. The pin comes first: shut() marks the file and then waits for older pins.
class File::Use {
 public:
  explicit Use(File& file) : pin_(file.requests_) {
    if (file.shut_.load(std::memory_order_seq_cst)) {
      throw Error(ENODEV, "FUSE file '" + file.name_ + "': the export was removed");
    }
  }

 private:
  base::Epoch::Pin pin_;
};

// Hears of what other users of the disk write.
class File::CacheWatcher final : public block::Node::ContentWatcher {
 public:
  CacheWatcher(std::shared_ptr<Invalidator> invalidator, uint64_t inode) noexcept
      : invalidator_(std::move(invalidator)), inode_(inode) {}

  void set_cached(bool cached) noexcept { cached_.store(cached, std::memory_order_seq_cst); }
  bool cached() const noexcept { return cached_.load(std::memory_order_relaxed); }
  void content_changed(uint64_t offset, uint64_t length) noexcept override {
    if (!cached_.load(std::memory_order_seq_cst)) return;
    invalidator_->invalidate(inode_, offset, length);
  }

 private:
  const std::shared_ptr<Invalidator> invalidator_;
  const uint64_t inode_;
  std::atomic<bool> cached_{false};
};

File::File(uint64_t inode, std::string name, block::Handle handle, bool writable)
    : inode_(inode),
      name_(std::move(name)),
      writable_(writable),
      handle_(std::move(handle)),
      last_size_(handle_.size()),
      changed_ns_(now_ns()) {}

File::~File() = default;

void File::keep_cache_true(const std::shared_ptr<Invalidator>& invalidator) {
  CacheWatcher* watcher = cache_.load(std::memory_order_acquire);
  if (watcher == nullptr) {
    const Use use(*this);
    auto made = std::make_shared<CacheWatcher>(invalidator, inode_);
    // Two at once use one watcher, and either registers it before it reads.
    std::unique_lock lock(cache_mutex_);
    if (!cache_owner_) cache_owner_ = std::move(made);
    const std::shared_ptr<CacheWatcher> chosen = cache_owner_;
    lock.unlock();
    handle_.watch(chosen);
    cache_.store(chosen.get(), std::memory_order_release);
    watcher = chosen.get();
  }
  if (!watcher->cached()) watcher->set_cached(true);
}

void File::forget_cache() noexcept {
  CacheWatcher* const watcher = cache_.load(std::memory_order_acquire);
  if (watcher != nullptr) watcher->set_cached(false);
}

uint64_t File::size() noexcept {
  const base::Epoch::Pin pin(requests_);
  if (!shut_.load(std::memory_order_seq_cst)) {
    last_size_.store(handle_.size(), std::memory_order_relaxed);
  }
  return last_size_.load(std::memory_order_relaxed);
}

void File::changed() noexcept { changed_ns_.store(now_ns(), std::memory_order_relaxed); }

size_t File::read(uint64_t offset, std::span<std::byte> to) {
  const Use use(*this);
  const uint64_t end = handle_.size();
  if (offset >= end) return 0;
  const size_t length = std::min<uint64_t>(to.size(), end - offset);
  if (length > 0) handle_.read(offset, base::SingleBuffer(to.first(length)));
  return length;
}

size_t File::write(uint64_t offset, std::span<const std::byte> from, bool durable) {
  const Use use(*this);
  if (!writable_) throw Error(EROFS, "FUSE file '" + name_ + "' is read-only");
  const uint64_t end = handle_.size();
  if (from.empty()) return 0;
  if (offset >= end) throw Error(ENOSPC, "FUSE file '" + name_ + "': write after the disk's end");
  const size_t length = std::min<uint64_t>(from.size(), end - offset);
  handle_.write(offset, base::SingleBuffer(from.first(length)), {.fua = durable});
  changed();
  return length;
}

void File::flush() {
  const Use use(*this);
  // Also of a read-only file: what others have written becomes durable, as with fsync(2).
  handle_.flush();
}

uint64_t File::zeroable_end(int mode, uint64_t offset, uint64_t length) const {
  const uint64_t end = handle_.size();
  // The kernel has checked that offset + length does not pass 2^63.
  const uint64_t asked = offset + length;
  if (asked <= end) return asked;
  if ((mode & FALLOC_FL_KEEP_SIZE) == 0) {
    throw Error(ENOSPC, "FUSE file '" + name_ + "': a disk does not grow by fallocate");
  }
  return std::max(end, offset);
}

void File::allocate(int mode, uint64_t offset, uint64_t length) {
  const Use use(*this);
  if (!writable_) throw Error(EROFS, "FUSE file '" + name_ + "' is read-only");
  const int action = mode & ~FALLOC_FL_KEEP_SIZE;
  if (action != 0 && action != FALLOC_FL_PUNCH_HOLE && action != FALLOC_FL_ZERO_RANGE) {
    throw Error(EOPNOTSUPP, "FUSE file '" + name_ + "': fallocate mode is not supported");
  }
  if (length > INT64_MAX || offset > INT64_MAX - length) {
    throw Error(EFBIG, "FUSE file '" + name_ + "': fallocate beyond any disk");
  }
  if (action == 0 && offset + length > handle_.size()) {
    // Nothing can be set aside behind the end, whatever the mode.
    throw Error(ENOSPC, "FUSE file '" + name_ + "': a disk does not grow by fallocate");
  }
  const uint64_t end = zeroable_end(mode, offset, length);
  if (action == 0 || end == offset) return;
  handle_.write_zeroes(offset, end - offset, {.may_unmap = action == FALLOC_FL_PUNCH_HOLE});
  changed();
}

uint64_t File::seek(uint64_t offset, int whence) {
  const Use use(*this);
  if (whence != SEEK_DATA && whence != SEEK_HOLE) {
    throw Error(EINVAL, "FUSE file '" + name_ + "': unknown seek");
  }
  const uint64_t end = handle_.size();
  if (offset >= end) throw Error(ENXIO, "FUSE file '" + name_ + "': seek after the end");
  const bool want_hole = whence == SEEK_HOLE;
  while (offset < end) {
    const block::BlockStatus status = handle_.block_status(offset, end - offset);
    if (status.zero == want_hole) return offset;
    offset += std::max<uint64_t>(status.length, 1);
  }
  if (!want_hole) throw Error(ENXIO, "FUSE file '" + name_ + "': no data up to the end");
  return end;  // every file ends in a hole
}

bool File::shut(base::Clock::time_point deadline) {
  shut_.store(true, std::memory_order_seq_cst);
  return requests_.synchronize_until(deadline);
}

void File::close() { handle_.close(); }

std::string File::describe() const {
  return fmt::format("  '{}': {} bytes, {}, open {} times, {} requests in flight, {} errors", name_,
                     last_size_.load(std::memory_order_relaxed),
                     writable_ ? "writable" : "read-only", opens, requests_.in_flight(),
                     errors_.load(std::memory_order_relaxed));
}

}  // namespace minivmm::fuse
