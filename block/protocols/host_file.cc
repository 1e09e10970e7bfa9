// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/host_file.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <mutex>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "block/protocols/file_lock.h"

namespace minivmm::block {

using base::errno_error;
using base::Error;

// Every open file, by device and inode. Opening is rare: one lock, a linear search.
class HostFile::Registry {
 public:
  std::mutex mutex;
  std::vector<std::weak_ptr<HostFile>> files;

  std::shared_ptr<HostFile> find(Key key) {
    std::erase_if(files, [](const auto& weak) { return weak.expired(); });
    for (const auto& weak : files) {
      auto file = weak.lock();
      if (file && file->key_ == key) return file;
    }
    return nullptr;
  }
};

HostFile::Registry& HostFile::registry() {
  static Registry instance;
  return instance;
}

HostFile::~HostFile() = default;

void HostFile::check_share(const HostFileOptions& options) const {
  const auto refuse = [&](const char* why) {
    const std::string same = options.filename == filename_
                                 ? std::string(": is")
                                 : fmt::format(": is the same file as {}, which is", filename_);
    return Error(EBUSY, fmt::format("{}{} open in this process already{}; use that node by its "
                                    "node-name instead of opening the file twice",
                                    options.filename, same, why));
  };
  if (writable_ && options.writable) throw refuse(" for writing");
  if (writable_) throw refuse(" for writing, so its content is not stable");
  if (options.writable) throw refuse(" read-only by a user that needs its content stable");
  if (direct_ != options.direct) throw refuse(" with another cache mode");
}

namespace {

base::UniqueFd open_fd(const HostFileOptions& options) {
  if (options.fd >= 0) {
    base::UniqueFd copy(::fcntl(options.fd, F_DUPFD_CLOEXEC, 3));
    if (!copy) throw errno_error(errno, fmt::format("file descriptor {}", options.fd));
    const int flags = ::fcntl(copy.get(), F_GETFL);
    const int mode = flags & O_ACCMODE;
    if (options.writable && mode != O_RDWR) {
      throw Error(EACCES, fmt::format("file descriptor {}: is not open for reading and writing",
                                      options.fd));
    }
    if (mode == O_WRONLY) {
      throw Error(EACCES, fmt::format("file descriptor {}: is not open for reading", options.fd));
    }
    return copy;
  }
  const int flags = (options.writable ? O_RDWR : O_RDONLY) | O_CLOEXEC |
                    (options.direct ? O_DIRECT : 0) | O_NONBLOCK | O_NOCTTY;
  base::UniqueFd fd(::open(options.filename.c_str(), flags));
  if (!fd) {
    const int err = errno;
    if (err == EINVAL && options.direct) {
      throw Error(err, fmt::format("{}: its file system has no O_DIRECT; use cache=writeback",
                                   options.filename));
    }
    if (options.writable && (err == EACCES || err == EROFS || err == EPERM)) {
      throw errno_error(err, fmt::format("{}: cannot open for writing (ro opens it read-only)",
                                         options.filename));
    }
    throw errno_error(err, fmt::format("{}: cannot open", options.filename));
  }
  return fd;
}

}  // namespace

std::shared_ptr<HostFile> HostFile::open(const HostFileOptions& options) {
  const std::lock_guard lock(registry().mutex);
  std::shared_ptr<HostFile> file(new HostFile);
  struct stat info {};
  if (options.fd < 0) {
    // Known before opening: a second open would not be refused by our own locks only if the
    // inode is found here first.
    if (::stat(options.filename.c_str(), &info) == 0 &&
        (S_ISREG(info.st_mode) || S_ISBLK(info.st_mode))) {
      const Key key{S_ISBLK(info.st_mode) ? info.st_rdev : info.st_dev,
                    S_ISBLK(info.st_mode) ? 0 : info.st_ino};
      if (auto known = registry().find(key)) {
        known->check_share(options);
        return known;
      }
    }
  }
  file->fd_ = open_fd(options);
  file->filename_ =
      options.fd >= 0 ? fmt::format("file descriptor {}", options.fd) : options.filename;
  if (::fstat(file->fd(), &info) != 0) throw errno_error(errno, file->filename_);
  if (S_ISDIR(info.st_mode))
    throw Error(EISDIR, fmt::format("{}: is a directory", file->filename_));
  if (!S_ISREG(info.st_mode) && !S_ISBLK(info.st_mode)) {
    throw Error(EINVAL,
                fmt::format("{}: is neither a regular file nor a block device", file->filename_));
  }
  file->is_device_ = S_ISBLK(info.st_mode);
  file->key_ = file->is_device_ ? Key{info.st_rdev, 0} : Key{info.st_dev, info.st_ino};
  file->writable_ = options.writable;
  file->direct_ = (::fcntl(file->fd(), F_GETFL) & O_DIRECT) != 0;
  if (options.fd >= 0) {
    if (auto known = registry().find(file->key_)) {
      known->check_share(options);
      return known;
    }
  }
  if (file->direct_) file->find_alignment();
  if (options.locking != Locking::kOff && !file->is_device_) {
    const bool locked = lock_image_file(file->fd(), file->filename_, {.writes = options.writable});
    if (!locked && options.locking == Locking::kOn) {
      throw Error(ENOTSUP, fmt::format("{}: its file system has no OFD locks (locking=on)",
                                       file->filename_));
    }
    if (!locked)
      base::log_warning("{}: its file system has no locks: take care that nobody else uses it",
                        file->filename_);
  }
  registry().files.push_back(file);
  return file;
}

void HostFile::find_alignment() {
  if (is_device_) {
    int block = 0;
    if (::ioctl(fd(), BLKSSZGET, &block) == 0 && block > 0) {
      memory_alignment_ = offset_alignment_ = static_cast<uint32_t>(block);
    }
  } else {
#ifdef STATX_DIOALIGN
    struct statx extended {};
    if (::statx(fd(), "", AT_EMPTY_PATH, STATX_DIOALIGN, &extended) == 0 &&
        (extended.stx_mask & STATX_DIOALIGN) != 0 && extended.stx_dio_offset_align != 0) {
      memory_alignment_ = std::max<uint32_t>(1, extended.stx_dio_mem_align);
      offset_alignment_ = extended.stx_dio_offset_align;
      return;
    }
#endif
  }
  // Unknown: what works everywhere.
  if (offset_alignment_ == 1) memory_alignment_ = offset_alignment_ = 4096;
}

uint64_t HostFile::query_size() const {
  if (is_device_) {
    uint64_t bytes = 0;
    if (::ioctl(fd(), BLKGETSIZE64, &bytes) != 0) throw errno_error(errno, filename_);
    return bytes;
  }
  struct stat info {};
  if (::fstat(fd(), &info) != 0) throw errno_error(errno, filename_);
  return static_cast<uint64_t>(info.st_size);
}

}  // namespace minivmm::block
