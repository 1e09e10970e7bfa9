// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <thread>

#include <fmt/core.h>

#include "base/error.h"
#include "base/io.h"
#include "base/log.h"
#include "base/pool.h"
#include "nbd-server/bind.h"

namespace minivmm::nbd {
namespace {

using base::errno_error;
using base::Error;
using base::UniqueFd;

constexpr auto kPatience = std::chrono::seconds(2);
constexpr auto kRetry = std::chrono::milliseconds(20);
constexpr int kBacklog = 1024;
constexpr size_t kMaxPath = sizeof(sockaddr_un::sun_path) - 1;

sockaddr_un unix_address(const std::string& path) {
  sockaddr_un out{};
  out.sun_family = AF_UNIX;
  if (path.size() > kMaxPath) {
    throw Error(ENAMETOOLONG, fmt::format("{}: a unix socket's path may have at most {} bytes; use "
                                          "a shorter or a relative one",
                                          path, kMaxPath));
  }
  std::memcpy(out.sun_path, path.data(), path.size());
  return out;
}

int connect_to(int fd, const sockaddr_un& address) noexcept {
  return ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address);
}

// The directory of the socket, locked: of several servers that start at once, one looks and
// replaces at a time. All is done by way of its descriptor, so that it is one directory throughout,
// whatever happens to the path.
class LockedDirectory {
 public:
  explicit LockedDirectory(const std::filesystem::path& socket)
      : fd_(::open(socket.parent_path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
    if (!fd_) {
      throw errno_error(errno, fmt::format("{}: cannot open its directory", socket.string()));
    }
    // Best effort: some file systems have no locks.
    const auto deadline = base::Clock::now() + kPatience;
    while (::flock(fd_.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK &&
           base::Clock::now() < deadline) {
      std::this_thread::sleep_for(kRetry);
    }
  }
  int get() const noexcept { return fd_.get(); }
  // Of an entry. By way of /proc it is short wherever the directory is.
  std::string path_of(const std::string& name) const {
    return fmt::format("/proc/self/fd/{}/{}", fd_.get(), name);
  }

 private:
  UniqueFd fd_;
};

enum class Occupant { kNone, kDead };

// What is at the path. Throws EADDRINUSE for a live socket, EEXIST for anything but a socket.
Occupant look_at(const LockedDirectory& directory, const std::string& name,
                 const std::string& path) {
  struct stat found {};
  if (::fstatat(directory.get(), name.c_str(), &found, AT_SYMLINK_NOFOLLOW) != 0) {
    if (errno == ENOENT) return Occupant::kNone;
    throw errno_error(errno, path);
  }
  if (!S_ISSOCK(found.st_mode)) {
    throw Error(EEXIST, fmt::format("{}: exists and is not a socket; remove it or choose another "
                                    "path",
                                    path));
  }
  const UniqueFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!probe) throw errno_error(errno, "cannot make a socket");
  // One of the two fits: whoever listens there has bound one of them.
  const std::string by_directory = directory.path_of(name);
  const bool fits = by_directory.size() <= kMaxPath;
  if (connect_to(probe.get(), unix_address(fits ? by_directory : path)) != 0) {
    if (errno == ECONNREFUSED) return Occupant::kDead;
    if (errno == ENOENT) return Occupant::kNone;
    // EAGAIN is a live server with a full backlog; EACCES one of somebody else.
  }
  throw Error(EADDRINUSE, fmt::format("{}: a process listens there already; stop it or choose "
                                      "another path",
                                      path));
}

// Binds under a passing name, so that the socket listens before anybody can find it.
UniqueFd listen_aside(const LockedDirectory& directory, const std::string& name) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) throw errno_error(errno, "cannot make a socket");
  // The mode of the file is the mode of the socket less the umask: there is no moment at which
  // others could connect.
  if (::fchmod(fd.get(), 0600) != 0) throw errno_error(errno, "cannot set a socket's mode");
  const sockaddr_un address = unix_address(directory.path_of(name));
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    throw errno_error(errno, fmt::format("cannot make the socket {}", name));
  }
  if (::listen(fd.get(), kBacklog) != 0) {
    const int err = errno;
    ::unlinkat(directory.get(), name.c_str(), 0);
    throw errno_error(err, "cannot listen on a unix socket");
  }
  return fd;
}

// An errand. False: somebody else was faster, look again.
bool try_bind(const std::filesystem::path& path, BoundSocket& out) {
  static std::atomic<unsigned> number{0};
  const LockedDirectory directory(path);
  const std::string name = path.filename().string();
  const Occupant occupant = look_at(directory, name, path.string());
  const std::string aside = fmt::format(".{}.{}.{}", name.substr(0, 32), ::getpid(), number++);
  UniqueFd fd = listen_aside(directory, aside);
  const unsigned flags = occupant == Occupant::kNone ? RENAME_NOREPLACE : 0;
  struct stat made {};
  int failed = ::fstatat(directory.get(), aside.c_str(), &made, AT_SYMLINK_NOFOLLOW);
  if (failed == 0) {
    failed = ::renameat2(directory.get(), aside.c_str(), directory.get(), name.c_str(), flags);
    // Some file systems know no flags: there the lock on the directory has to do.
    if (failed != 0 && errno == EINVAL) {
      failed = ::renameat(directory.get(), aside.c_str(), directory.get(), name.c_str());
    }
  }
  if (failed != 0) {
    const int err = errno;
    ::unlinkat(directory.get(), aside.c_str(), 0);
    if (err == EEXIST) return false;
    throw errno_error(err, fmt::format("{}: cannot make the socket", path.string()));
  }
  if (occupant == Occupant::kDead) {
    base::log_info("{}: replaced the socket of a process that has ended", path.string());
  }
  out.fd = std::move(fd);
  out.file = SocketFile(path.string(), made.st_dev, made.st_ino);
  return true;
}

}  // namespace

SocketFile& SocketFile::operator=(SocketFile&& other) noexcept {
  if (this != &other) {
    remove();
    path_ = std::move(other.path_);
    other.path_.clear();
    device_ = other.device_;
    inode_ = other.inode_;
  }
  return *this;
}

void SocketFile::remove() noexcept {
  if (path_.empty()) return;
  struct stat found {};
  if (::lstat(path_.c_str(), &found) == 0 && found.st_dev == device_ && found.st_ino == inode_) {
    ::unlink(path_.c_str());
  }
  path_.clear();
}

namespace {

// Absolute, because the working directory may change. "link/.." is what the system says, not what
// the text looks like.
std::filesystem::path absolute_path(const std::string& given) {
  std::filesystem::path out = std::filesystem::absolute(given);
  if (!out.has_filename() || out.filename() == "." || out.filename() == "..") {
    throw Error(EINVAL, fmt::format("{}: names a directory; name the socket to make in it", given));
  }
  if (std::find(out.begin(), out.end(), "..") == out.end()) return out.lexically_normal();
  std::error_code failed;
  const std::filesystem::path directory = std::filesystem::canonical(out.parent_path(), failed);
  if (failed) throw errno_error(failed.value(), fmt::format("{}: its directory", given));
  return directory / out.filename();
}

}  // namespace

BoundSocket bind_unix(const std::string& path) {
  (void)unix_address(path);  // what clients will have to connect to
  const std::filesystem::path absolute =
      base::Pool::errands().run([&] { return absolute_path(path); });
  const auto deadline = base::Clock::now() + kPatience;
  BoundSocket out;
  for (;;) {
    try {
      if (base::Pool::errands().run([&] { return try_bind(absolute, out); })) {
        // What clients connect to.
        out.address.socket_path = absolute.native().size() <= kMaxPath ? absolute.string() : path;
        return out;
      }
    } catch (const Error& e) {
      // A process that was just killed may take a moment to be gone.
      if (e.err() != EADDRINUSE || base::Clock::now() >= deadline) throw;
    }
    (void)base::io::sleep_for(kRetry);
  }
}

}  // namespace minivmm::nbd
