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
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/log.h"
#include "block/graph/types.h"
#include "block/protocols/file_lock.h"

namespace minivmm::block {

using base::errno_error;
using base::Error;

namespace {

std::string descriptor_name(int number) { return fmt::format("file descriptor {}", number); }

Error no_direct(const std::string& filename) {
  return {EINVAL,
          fmt::format("{}: its file system has no O_DIRECT; use cache=writeback", filename)};
}

}  // namespace

// Nothing for what is no disk. A device is the same by whatever node of /dev it is opened.
std::optional<HostFile::Key> HostFile::key_of(const struct stat& info) noexcept {
  if (S_ISBLK(info.st_mode)) return Key{info.st_rdev, 0};
  if (S_ISREG(info.st_mode)) return Key{info.st_dev, info.st_ino};
  return std::nullopt;
}

// Every open file, by device and inode. Opening is rare: one lock, a linear search.
class HostFile::Registry {
 public:
  std::mutex mutex;
  std::vector<std::weak_ptr<HostFile>> files;

  std::shared_ptr<HostFile> find(Key key) {
    std::erase_if(files, [](const auto& weak) { return weak.expired(); });
    for (const auto& weak : files) {
      auto file = weak.lock();
      // One whose last user is just letting go is as good as closed.
      if (file && file->key_ == key && file->in_use()) return file;
    }
    return nullptr;
  }
};

HostFile::Registry& HostFile::registry() {
  static Registry instance;
  return instance;
}

// Not left to the closing of the descriptor: other references to the open file hold its locks as
// well, which are its other holders', or the kernel's own. (A worker of io_uring lets go of a file
// when it comes to it, on a busy machine after this process has ended; whoever runs next, and
// does not retry, would find the image in use.)
HostFile::~HostFile() {
  if (locked_) unlock_image_file(fd());
}

// One opener's part in the file, behind the pointer that it was given.
class HostFile::Opener {
 public:
  Opener(std::shared_ptr<HostFile> file, std::string name)
      : file_(std::move(file)), name_(std::move(name)) {
    const std::lock_guard lock(file_->openers_mutex_);
    file_->openers_.push_back(name_);
  }
  ~Opener() {
    const std::lock_guard lock(file_->openers_mutex_);
    auto& names = file_->openers_;
    names.erase(std::find(names.begin(), names.end(), name_));
  }
  Opener(const Opener&) = delete;
  Opener& operator=(const Opener&) = delete;
  HostFile* file() const noexcept { return file_.get(); }

 private:
  const std::shared_ptr<HostFile> file_;
  const std::string name_;
};

std::shared_ptr<HostFile> HostFile::opened_by(std::shared_ptr<HostFile> file, std::string opener) {
  auto part = std::make_shared<Opener>(std::move(file), std::move(opener));
  HostFile* const raw = part->file();
  return {std::move(part), raw};
}

bool HostFile::in_use() const {
  const std::lock_guard lock(openers_mutex_);
  return !openers_.empty();
}

std::string HostFile::openers() const {
  const std::lock_guard lock(openers_mutex_);
  return fmt::format("{}", fmt::join(openers_, " and "));
}

void HostFile::check_share(const HostFileOptions& options, bool direct) const {
  const auto refuse = [&](const char* how, const char* why) {
    const std::string name = options.fd >= 0 ? descriptor_name(options.fd) : options.filename;
    const std::string same =
        name == filename_ ? "is" : fmt::format("is the same file as {}, which is", filename_);
    return Error(EBUSY, fmt::format("{}: {} already open {} by {}{}; share one node instead of "
                                    "opening the file twice",
                                    name, same, how, openers(), why));
  };
  if (writable_) {
    throw refuse("for writing", options.writable ? "" : ", so its content is not stable");
  }
  if (options.writable) throw refuse("read-only", ", which needs its content stable");
  if (direct_ != direct) throw refuse("with another cache mode", "");
}

void HostFile::duplicate(const HostFileOptions& options) {
  filename_ = descriptor_name(options.fd);
  fd_.reset(::fcntl(options.fd, F_DUPFD_CLOEXEC, 3));
  if (!fd_) throw errno_error(errno, filename_);
  const int mode = ::fcntl(fd(), F_GETFL) & O_ACCMODE;
  if (options.writable && mode != O_RDWR) {
    throw Error(EACCES, fmt::format("{}: is not open for reading and writing", filename_));
  }
  if (mode == O_WRONLY) throw Error(EACCES, fmt::format("{}: is not open for reading", filename_));
}

void HostFile::open_path(const HostFileOptions& options) {
  filename_ = options.filename;
  // O_NONBLOCK: a FIFO of that name must not hold us up.
  const int flags = (options.writable ? O_RDWR : O_RDONLY) | O_CLOEXEC |
                    (options.direct ? O_DIRECT : 0) | O_NONBLOCK | O_NOCTTY;
  fd_.reset(::open(filename_.c_str(), flags));
  if (fd_) return;
  const int err = errno;
  if (err == EINVAL && options.direct) throw no_direct(filename_);
  if (options.writable && (err == EACCES || err == EROFS || err == EPERM)) {
    throw errno_error(
        err, fmt::format("{}: cannot open for writing (ro opens it read-only)", filename_));
  }
  throw errno_error(err, fmt::format("{}: cannot open", filename_));
}

void HostFile::check_inode(const HostFileOptions& options, const struct stat& info) {
  if (options.inode.empty() || options.inode == fmt::format("{}:{}", info.st_dev, info.st_ino)) {
    return;
  }
  throw Error(EACCES, fmt::format("{}: was replaced by another file while it was opened; try again",
                                  options.filename));
}

void HostFile::open_descriptor(const HostFileOptions& options) {
  if (options.fd >= 0) {
    duplicate(options);
  } else {
    open_path(options);
  }
  struct stat info {};
  if (::fstat(fd(), &info) != 0) throw errno_error(errno, filename_);
  check_inode(options, info);
  if (S_ISDIR(info.st_mode)) throw Error(EISDIR, fmt::format("{}: is a directory", filename_));
  const auto key = key_of(info);
  if (!key) {
    throw Error(EINVAL, fmt::format("{}: is neither a regular file nor a block device", filename_));
  }
  key_ = *key;
  is_device_ = S_ISBLK(info.st_mode);
  writable_ = options.writable;
  direct_ = options.direct || (::fcntl(fd(), F_GETFL) & O_DIRECT) != 0;
}

// Of an inherited descriptor these are also its other holders' flags.
void HostFile::set_flags() {
  // Not O_NONBLOCK any more: io_uring would take it as "fail rather than wait" on file systems that
  // cannot say whether they would wait, and believe others that they never do.
  const int flags = ::fcntl(fd(), F_GETFL);
  const int wanted = (flags & ~O_NONBLOCK) | (direct_ ? O_DIRECT : 0);
  if (wanted == flags || ::fcntl(fd(), F_SETFL, wanted) == 0) return;
  if (errno == EINVAL && direct_) throw no_direct(filename_);
  throw errno_error(errno, filename_);
}

void HostFile::lock(Locking locking) {
  if (locking == Locking::kOff) return;
  locked_ = lock_image_file(fd(), filename_, {.writes = writable_});
  if (locked_) return;
  if (locking == Locking::kOn) {
    throw Error(ENOTSUP,
                fmt::format("{}: its file system has no OFD locks (locking=on)", filename_));
  }
  base::log_warning("{}: its file system has no locks: take care that nobody else uses it",
                    filename_);
}

std::shared_ptr<HostFile> HostFile::open(const HostFileOptions& options) {
  const std::lock_guard lock(registry().mutex);
  const auto share = [&](std::shared_ptr<HostFile> known, bool direct) {
    known->check_share(options, direct);
    return opened_by(std::move(known), options.opener);
  };
  // Looked for before opening: what is refused is not opened at all.
  struct stat info {};
  if (options.fd < 0 && ::stat(options.filename.c_str(), &info) == 0) {
    check_inode(options, info);
    const auto key = key_of(info);
    if (auto known = key ? registry().find(*key) : nullptr) {
      return share(std::move(known), options.direct);
    }
  }
  std::shared_ptr<HostFile> file(new HostFile);
  file->open_descriptor(options);
  // And after: the name may have been another file's a moment ago.
  if (auto known = registry().find(file->key_)) return share(std::move(known), file->direct_);
  file->set_flags();
  if (file->direct_) file->find_alignment();
  file->lock(options.locking);
  if (!file->direct_) {
    file->cached_pages_ = CachedPages::map(file->fd(), file->query_size(), file->writable_);
  }
  registry().files.push_back(file);
  return opened_by(std::move(file), options.opener);
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
  uint64_t bytes = 0;
  if (is_device_) {
    if (::ioctl(fd(), BLKGETSIZE64, &bytes) != 0) throw errno_error(errno, filename_);
  } else {
    struct stat info {};
    if (::fstat(fd(), &info) != 0) throw errno_error(errno, filename_);
    bytes = static_cast<uint64_t>(info.st_size);
  }
  if (bytes > kMaxDiskSize) {
    throw Error(EFBIG, fmt::format("{}: {} bytes is larger than any disk may be ({})", filename_,
                                   bytes, kMaxDiskSize));
  }
  return bytes;
}

}  // namespace minivmm::block
