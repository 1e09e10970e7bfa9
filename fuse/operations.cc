// SPDX-License-Identifier: Apache-2.0
#include "fuse/operations.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <utility>

#include "fuse/channel.h"
#include "fuse/kernel_abi.h"
#include "fuse/reply_errno.h"
#include "fuse/session.h"

namespace minivmm::fuse {
namespace {

constexpr unsigned kBlockSize = 4096;
// So many requests of the asynchronous kind the kernel sends at once; from the second number on it
// tells writers back to slow down.
constexpr unsigned kMaxBackground = 512;
constexpr unsigned kCongestion = 384;

Session& session_of(fuse_req_t request) {
  return *static_cast<Session*>(::fuse_req_userdata(request));
}

// SAFETY: the kernel hands back what open() gave it, and the file lives until the last release.
File& file_of(const fuse_file_info* info) { return *reinterpret_cast<File*>(info->fh); }

struct stat directory_attributes(const Session& session) {
  struct stat out {};
  const Appearance& look = session.appearance();
  const mode_t readable = look.mode & 0444;
  out.st_ino = kRootInode;
  out.st_mode = S_IFDIR | readable | readable >> 2;
  out.st_nlink = 2;
  out.st_uid = look.uid;
  out.st_gid = look.gid;
  out.st_blksize = kBlockSize;
  return out;
}

struct stat file_attributes(const Session& session, File& file) {
  struct stat out {};
  const Appearance& look = session.appearance();
  const mode_t mode = look.mode & (file.writable() ? 0777U : 0555U);
  out.st_ino = file.inode();
  out.st_mode = S_IFREG | mode;
  out.st_nlink = 1;
  out.st_uid = look.uid;
  out.st_gid = look.gid;
  out.st_size = static_cast<off_t>(file.size());
  out.st_blocks = (out.st_size + 511) / 512;
  out.st_blksize = kBlockSize;
  out.st_mtim.tv_sec = file.changed_ns() / 1'000'000'000;
  out.st_mtim.tv_nsec = file.changed_ns() % 1'000'000'000;
  out.st_ctim = out.st_mtim;
  out.st_atim = out.st_mtim;
  return out;
}

// Nothing is ever cached: sizes change and files come and go without the kernel's doing.
constexpr double kNoCaching = 0.0;

// Runs a request that may wait as a fiber, and answers with what `work` throws or, if it throws
// nothing, lets it answer itself. `what` is for state dumps.
template <typename Work>
void run_request(fuse_req_t request, const Activity& activity, Work work) {
  Channel& channel = session_of(request).channel();
  try {
    channel.spawn(activity, [request, file = activity.file, work = std::move(work)]() mutable {
      int error = 0;
      try {
        work(request);
      } catch (...) {
        error = reply_errno(std::current_exception());
      }
      if (error == 0) return;
      file->count_error();
      ::fuse_reply_err(request, error);
    });
  } catch (...) {
    ::fuse_reply_err(request, reply_errno(std::current_exception()));
  }
}

void op_init(void*, fuse_conn_info* connection) {
  // Taken: reads and direct I/O of one file in parallel. Not taken: splice (a page at a time
  // through pipes costs more than it saves), the page cache's modes (nothing is cached), remote
  // locks (locks are between processes of this host, and the kernel does them), atomic O_TRUNC (the
  // kernel would believe that the file is empty until it asks again).
  connection->want =
      connection->capable & (FUSE_CAP_ASYNC_READ | FUSE_CAP_ASYNC_DIO | FUSE_CAP_PARALLEL_DIROPS);
  connection->max_write = kMaxTransfer;
  connection->max_background = kMaxBackground;
  connection->congestion_threshold = kCongestion;
}

void op_lookup(fuse_req_t request, fuse_ino_t parent, const char* name) {
  Session& session = session_of(request);
  const auto file = parent == kRootInode ? session.files().find(std::string_view(name)) : nullptr;
  if (!file) {
    ::fuse_reply_err(request, ENOENT);
    return;
  }
  fuse_entry_param entry{};
  entry.ino = file->inode();
  entry.attr = file_attributes(session, *file);
  entry.attr_timeout = kNoCaching;
  entry.entry_timeout = kNoCaching;
  ::fuse_reply_entry(request, &entry);
}

void reply_attributes(fuse_req_t request, fuse_ino_t inode) {
  Session& session = session_of(request);
  struct stat attributes {};
  if (inode == kRootInode) {
    attributes = directory_attributes(session);
  } else {
    const auto file = session.files().find(uint64_t{inode});
    if (!file) {
      ::fuse_reply_err(request, ENOENT);
      return;
    }
    attributes = file_attributes(session, *file);
  }
  ::fuse_reply_attr(request, &attributes, kNoCaching);
}

void op_getattr(fuse_req_t request, fuse_ino_t inode, fuse_file_info*) {
  reply_attributes(request, inode);
}

// Sizes, owners and modes are fixed. Two changes are let pass without effect, because tools make
// them unasked: the times (touch, cp -p), and truncation to nothing by path, which is what
// open(O_TRUNC) looks like from here; a block device ignores that too.
void op_setattr(fuse_req_t request, fuse_ino_t inode, struct stat* wanted, int to_set,
                fuse_file_info* info) {
  int error = 0;
  if ((to_set & (FUSE_SET_ATTR_MODE | FUSE_SET_ATTR_UID | FUSE_SET_ATTR_GID)) != 0) error = EPERM;
  if ((to_set & FUSE_SET_ATTR_SIZE) != 0) {
    const auto file = session_of(request).files().find(uint64_t{inode});
    if (!file) {
      error = ENOENT;
    } else if (!file->writable()) {
      error = EROFS;
    } else if (static_cast<uint64_t>(wanted->st_size) != file->size() &&
               (wanted->st_size != 0 || info != nullptr)) {
      error = EPERM;
    }
  }
  if (error != 0) {
    ::fuse_reply_err(request, error);
  } else {
    reply_attributes(request, inode);
  }
}

void op_open(fuse_req_t request, fuse_ino_t inode, fuse_file_info* info) {
  FileTable& files = session_of(request).files();
  File* const file = files.open(inode);
  if (file == nullptr) {
    ::fuse_reply_err(request, ENOENT);
    return;
  }
  if ((info->flags & O_ACCMODE) != O_RDONLY && !file->writable()) {
    files.release(*file);
    ::fuse_reply_err(request, EROFS);
    return;
  }
  info->fh = reinterpret_cast<uintptr_t>(file);
  info->direct_io = 1;
  // Interrupted: the kernel will not release what it did not get.
  if (::fuse_reply_open(request, info) == -ENOENT) files.release(*file);
}

void op_release(fuse_req_t request, fuse_ino_t, fuse_file_info* info) {
  session_of(request).files().release(file_of(info));
  ::fuse_reply_err(request, 0);
}

void op_fsync(fuse_req_t request, fuse_ino_t, int, fuse_file_info* info) {
  File& file = file_of(info);
  run_request(request, {"flush", &file, 0, 0}, [&file](fuse_req_t r) {
    file.flush();
    ::fuse_reply_err(r, 0);
  });
}

void op_fallocate(fuse_req_t request, fuse_ino_t, int mode, off_t offset, off_t length,
                  fuse_file_info* info) {
  File& file = file_of(info);
  const auto at = static_cast<uint64_t>(offset);
  const auto bytes = static_cast<uint64_t>(length);
  run_request(request, {"fallocate", &file, at, bytes}, [&file, mode, at, bytes](fuse_req_t r) {
    file.allocate(mode, at, bytes);
    ::fuse_reply_err(r, 0);
  });
}

void op_lseek(fuse_req_t request, fuse_ino_t, off_t offset, int whence, fuse_file_info* info) {
  File& file = file_of(info);
  const auto at = static_cast<uint64_t>(offset);
  run_request(request, {"lseek", &file, at, 0}, [&file, at, whence](fuse_req_t r) {
    ::fuse_reply_lseek(r, static_cast<off_t>(file.seek(at, whence)));
  });
}

// Positions in the directory are inode numbers (the files') and the two small ones below them, so
// that they stay good while files come and go.
void op_readdir(fuse_req_t request, fuse_ino_t inode, size_t size, off_t position,
                fuse_file_info*) {
  constexpr size_t kMost = 2048;  // on a fiber's stack
  char buffer[kMost];
  if (inode != kRootInode) {
    ::fuse_reply_err(request, ENOTDIR);
    return;
  }
  const size_t room = std::min(size, sizeof buffer);
  size_t used = 0;
  const auto add = [&](const char* name, uint64_t number, mode_t type, off_t next) {
    struct stat attributes {};
    attributes.st_ino = number;
    attributes.st_mode = type;
    const size_t needed =
        ::fuse_add_direntry(request, buffer + used, room - used, name, &attributes, next);
    if (needed > room - used) return false;
    used += needed;
    position = next;
    return true;
  };
  static_assert(kRootInode == 1, "positions 0 and 1 are before the files'");
  bool more = true;
  // "." leads to a position that is no inode's and below them all.
  if (position == 0) more = add(".", kRootInode, S_IFDIR, 1);
  if (more && position == 1) more = add("..", kRootInode, S_IFDIR, 2);
  while (more) {
    const auto after = static_cast<uint64_t>(position) - 1;
    const auto file = session_of(request).files().next_after(after);
    if (!file) break;
    more = add(file->name().c_str(), file->inode(), S_IFREG, static_cast<off_t>(file->inode()) + 1);
  }
  ::fuse_reply_buf(request, buffer, used);
}

void op_statfs(fuse_req_t request, fuse_ino_t) {
  struct statvfs out {};
  const auto files = session_of(request).files().all();
  uint64_t bytes = 0;
  for (const auto& file : files) bytes += file->size();
  out.f_bsize = kBlockSize;
  out.f_frsize = kBlockSize;
  out.f_blocks = bytes / kBlockSize;
  out.f_files = files.size();
  out.f_namemax = 255;
  ::fuse_reply_statfs(request, &out);
}

void refuse(fuse_req_t request) { ::fuse_reply_err(request, EPERM); }

}  // namespace

fuse_lowlevel_ops make_operations() noexcept {
  fuse_lowlevel_ops out{};
  out.init = op_init;
  out.lookup = op_lookup;
  out.getattr = op_getattr;
  out.setattr = op_setattr;
  out.open = op_open;
  out.release = op_release;
  out.fsync = op_fsync;
  out.fallocate = op_fallocate;
  out.lseek = op_lseek;
  out.readdir = op_readdir;
  out.statfs = op_statfs;
  out.fsyncdir = [](fuse_req_t r, fuse_ino_t, int, fuse_file_info*) { ::fuse_reply_err(r, 0); };
  // The directory changes only by adding and removing exports. Without these libfuse would say
  // ENOSYS, which no tool expects.
  out.mknod = [](fuse_req_t r, fuse_ino_t, const char*, mode_t, dev_t) { refuse(r); };
  out.mkdir = [](fuse_req_t r, fuse_ino_t, const char*, mode_t) { refuse(r); };
  out.create = [](fuse_req_t r, fuse_ino_t, const char*, mode_t, fuse_file_info*) { refuse(r); };
  out.unlink = [](fuse_req_t r, fuse_ino_t, const char*) { refuse(r); };
  out.rmdir = [](fuse_req_t r, fuse_ino_t, const char*) { refuse(r); };
  out.symlink = [](fuse_req_t r, const char*, fuse_ino_t, const char*) { refuse(r); };
  out.link = [](fuse_req_t r, fuse_ino_t, fuse_ino_t, const char*) { refuse(r); };
  out.rename = [](fuse_req_t r, fuse_ino_t, const char*, fuse_ino_t, const char*, unsigned) {
    refuse(r);
  };
  return out;
}

}  // namespace minivmm::fuse
