// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/file_lock.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <initializer_list>
#include <thread>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::block {
namespace {

// QEMU's permission numbers and lock bases.
enum Permission : int { kConsistentRead = 0, kWrite = 1, kWriteUnchanged = 2, kResize = 3 };
constexpr off_t kUsedBase = 100;
constexpr off_t kUnsharedBase = 200;

constexpr auto kRetryFor = std::chrono::seconds(2);
constexpr auto kRetryEvery = std::chrono::milliseconds(20);

const char* permission_name(int permission) {
  switch (permission) {
    case kConsistentRead:
      return "consistent read";
    case kWrite:
      return "write";
    case kWriteUnchanged:
      return "write unchanged";
    default:
      return "resize";
  }
}

struct flock byte_range(short type, off_t at) {
  struct flock range {};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  range.l_start = at;
  range.l_len = 1;
  return range;
}

// 0, or errno.
int set_shared(int fd, off_t at) {
  struct flock range = byte_range(F_RDLCK, at);
  return ::fcntl(fd, F_OFD_SETLK, &range) == 0 ? 0 : errno;
}

// True if somebody else holds any lock on the byte.
bool held_by_others(int fd, off_t at) {
  struct flock range = byte_range(F_WRLCK, at);
  return ::fcntl(fd, F_OFD_GETLK, &range) == 0 && range.l_type != F_UNLCK;
}

struct Conflict {
  int permission = -1;
  bool they_use = false;  // they use what we do not share; else they do not share what we use
};

Conflict find_conflict(int fd, bool writes) {
  for (const int p : {kConsistentRead, kWrite, kResize}) {
    const bool used = p == kConsistentRead || writes;
    if (used && held_by_others(fd, kUnsharedBase + p)) return {p, false};
  }
  // Nobody else may write or resize while we use the image.
  for (const int p : {kWrite, kResize}) {
    if (held_by_others(fd, kUsedBase + p)) return {p, true};
  }
  return {};
}

}  // namespace

void unlock_image_file(int fd) noexcept {
  struct flock range = byte_range(F_UNLCK, kUsedBase);
  range.l_len = kUnsharedBase + 10 - kUsedBase;
  (void)::fcntl(fd, F_OFD_SETLK, &range);
}

bool lock_image_file(int fd, const std::string& filename, FileLock lock) {
  const auto give_up = std::chrono::steady_clock::now() + kRetryFor;
  for (;;) {
    int err = 0;
    for (const int p : {kConsistentRead, kWrite, kResize}) {
      const bool used = p == kConsistentRead || lock.writes;
      if (err == 0 && used) err = set_shared(fd, kUsedBase + p);
      if (err == 0 && p != kConsistentRead) err = set_shared(fd, kUnsharedBase + p);
    }
    if (err == EINVAL || err == ENOLCK || err == EOPNOTSUPP) {
      unlock_image_file(fd);
      return false;
    }
    Conflict conflict;
    if (err == 0) {
      conflict = find_conflict(fd, lock.writes);
      if (conflict.permission < 0) return true;
    }
    unlock_image_file(fd);
    if (std::chrono::steady_clock::now() >= give_up) {
      const std::string why =
          conflict.permission < 0 ? base::errno_text(err)
          : conflict.they_use     ? fmt::format("another process has it open for {}",
                                                permission_name(conflict.permission))
                              : fmt::format("another process has it open and does not share \"{}\"",
                                            permission_name(conflict.permission));
      throw base::Error(EBUSY,
                        fmt::format("{}: is in use: {}; end that process, or open this one "
                                    "read-only on a copy (locking=off overrides, at your risk)",
                                    filename, why));
    }
    std::this_thread::sleep_for(kRetryEvery);
  }
}

}  // namespace minivmm::block
