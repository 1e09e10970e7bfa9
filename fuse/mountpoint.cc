// SPDX-License-Identifier: Apache-2.0
#include "fuse/mountpoint.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <future>
#include <memory>
#include <sstream>
#include <thread>

#include <fmt/core.h>
#include <limits.h>
#include <spawn.h>

#include "base/error.h"
#include "base/log.h"
#include "base/unique_fd.h"

namespace minivmm::fuse {
namespace {

using base::errno_error;
using base::Error;

// mountinfo writes blank, tab, newline and backslash as three octal digits.
std::string unescape(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto digit = [&](size_t n) {
      return i + n < text.size() && text[i + n] >= '0' && text[i + n] <= '7';
    };
    if (text[i] == '\\' && digit(1) && digit(2) && digit(3)) {
      out.push_back(static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 +
                                      (text[i + 3] - '0')));
      i += 3;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

// "36 35 98:0 /root /point options optional... - type source options"
std::optional<MountEntry> parse_line(const std::string& line) {
  std::istringstream words(line);
  std::string skip;
  std::string point;
  for (int i = 0; i < 4; ++i) words >> skip;
  words >> point;
  while (words >> skip && skip != "-") {
  }
  MountEntry entry;
  std::string source;
  if (!(words >> entry.type >> source)) return std::nullopt;
  entry.point = unescape(point);
  entry.source = unescape(source);
  return entry;
}

std::string read_mountinfo() {
  std::ifstream file("/proc/self/mountinfo");
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) throw Error(EIO, "cannot read /proc/self/mountinfo");
  return text.str();
}

// Without what stands for nothing at the end: "dir/", "dir/.".
std::filesystem::path without_tail(std::filesystem::path path) {
  while (path.has_relative_path() && (!path.has_filename() || path.filename() == ".")) {
    path = path.parent_path();
  }
  return path;
}

// Where a symbolic link points, or nothing. std::filesystem asks what it is first, and a mount that
// lies there may never answer that.
std::filesystem::path link_target(const std::filesystem::path& path) {
  std::string target(PATH_MAX, '\0');
  const ssize_t length = ::readlink(path.c_str(), target.data(), target.size());
  target.resize(length > 0 ? static_cast<size_t>(length) : 0);
  return target;
}

// True if the process that made the mount has been killed and is on its way out. It may never
// get there while somebody in the kernel waits for an answer that only it could have given.
bool owner_is_dying(const MountEntry& mount) {
  constexpr std::string_view kPrefix = "minivmm:";
  if (mount.type != kMountType || !mount.source.starts_with(kPrefix)) return false;
  std::ifstream file("/proc/" + mount.source.substr(kPrefix.size()) + "/stat");
  std::string line;
  std::getline(file, line);
  const size_t name_end = line.rfind(") ");
  if (name_end == std::string::npos || name_end + 2 >= line.size()) return false;
  return line[name_end + 2] == 'Z' || line[name_end + 2] == 'X';
}

enum class Life { kAlive, kDead, kDying, kSilent };

// Looks at a mount without waiting for ever: one whose process hangs or is dying does not answer.
Life look_at(const std::string& path, const MountEntry& mount) {
  constexpr std::chrono::milliseconds kTick{20};
  constexpr std::chrono::seconds kPatience{5};
  auto answer = std::make_shared<std::promise<int>>();
  std::future<int> error = answer->get_future();
  std::thread([answer, path] {
    struct stat info {};
    answer->set_value(::stat(path.c_str(), &info) == 0 ? 0 : errno);
  }).detach();
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (error.wait_for(kTick) != std::future_status::ready) {
    if (owner_is_dying(mount)) return Life::kDying;
    if (std::chrono::steady_clock::now() >= deadline) return Life::kSilent;
  }
  const int err = error.get();
  return err == ENOTCONN || err == ECONNABORTED ? Life::kDead : Life::kAlive;
}

// Detaches the dead mounts of ours that lie at `path`, one over the other.
void clean_dead_mounts(const std::string& path) {
  constexpr int kMostCrashes = 64;
  for (int i = 0; i < kMostCrashes; ++i) {
    const std::vector<MountEntry> mounts = mounts_at(read_mountinfo(), path);
    if (mounts.empty()) return;
    const MountEntry& top = mounts.back();
    const Life life = look_at(path, top);
    if (life == Life::kAlive || life == Life::kSilent) {
      throw Error(EBUSY, fmt::format("FUSE mountpoint {}: {} ({}) is mounted there and {}; unmount "
                                     "it or choose another directory",
                                     path, top.source, top.type,
                                     life == Life::kAlive ? "alive" : "does not answer"));
    }
    if (top.type != kMountType) {
      throw Error(EBUSY,
                  fmt::format("FUSE mountpoint {}: a dead mount of {} ({}) is there, which is "
                              "not ours; detach it with `umount -l {}`",
                              path, top.source, top.type, path));
    }
    base::log_info("{}: detaching the dead mount that {} left", path, top.source);
    detach(path, life == Life::kDying);
  }
  throw Error(EBUSY, fmt::format("FUSE mountpoint {}: too many dead mounts", path));
}

// fusermount3 is what may unmount for those who are not root. 0 or an errno.
int run_fusermount(const std::string& path, bool lazy) {
  std::string program = "fusermount3";
  std::string flags = lazy ? "-uqz" : "-uq";
  std::string end = "--";
  std::string point = path;
  char* arguments[] = {program.data(), flags.data(), end.data(), point.data(), nullptr};
  pid_t child = 0;
  const int error = ::posix_spawnp(&child, program.c_str(), nullptr, nullptr, arguments, environ);
  if (error != 0) return error;
  int status = 0;
  while (::waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return errno;
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 0;
  return EBUSY;  // it says no more
}

}  // namespace

std::vector<MountEntry> mounts_at(std::string_view mountinfo, std::string_view point) {
  std::vector<MountEntry> out;
  std::istringstream lines{std::string(mountinfo)};
  for (std::string line; std::getline(lines, line);) {
    const std::optional<MountEntry> entry = parse_line(line);
    if (entry && entry->point == point) out.push_back(*entry);
  }
  return out;
}

std::string mount_source() { return fmt::format("minivmm:{}", ::getpid()); }

bool is_mount_of_this_process(const std::string& path) {
  const std::vector<MountEntry> mounts = mounts_at(read_mountinfo(), path);
  return !mounts.empty() && mounts.back().type == kMountType &&
         mounts.back().source == mount_source();
}

// All but the last component is resolved: that one may be a dead mount, which nothing can look
// into. What comes before ".." may be a link, so that is for the system to resolve, not for the
// text.
std::string resolve_mountpoint(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::path given = without_tail(fs::absolute(path, error));
  if (error) throw Error(error.value(), path + ": not a usable path");
  constexpr int kMostLinks = 40;
  for (int i = 0; i < kMostLinks; ++i) {
    const fs::path target = link_target(given);
    if (target.empty()) break;
    given = without_tail(given.parent_path() / target);
  }
  if (given.filename() == ".." || !given.has_relative_path()) {
    given = fs::canonical(given, error);
    if (error) throw errno_error(error.value(), "FUSE mountpoint " + path);
  }
  const fs::path parent = fs::canonical(given.parent_path(), error);
  if (error) {
    throw errno_error(error.value(), "FUSE mountpoint " + path + ": its parent directory " +
                                         given.parent_path().string());
  }
  return (parent / given.filename()).string();
}

Mountpoint prepare_mountpoint(const std::string& path) {
  Mountpoint out{.path = resolve_mountpoint(path)};
  clean_dead_mounts(out.path);
  struct stat info {};
  if (::stat(out.path.c_str(), &info) != 0) {
    if (errno != ENOENT) throw errno_error(errno, "FUSE mountpoint " + out.path);
    if (::mkdir(out.path.c_str(), 0755) != 0) {
      throw errno_error(errno, "FUSE mountpoint " + out.path + ": cannot make it");
    }
    out.created = true;
    return out;
  }
  if (!S_ISDIR(info.st_mode)) {
    throw Error(ENOTDIR, "FUSE mountpoint " + out.path + " is not a directory");
  }
  std::error_code error;
  const bool empty = std::filesystem::is_empty(out.path, error);
  if (error) throw errno_error(error.value(), "FUSE mountpoint " + out.path);
  if (!empty) {
    throw Error(ENOTEMPTY, "FUSE mountpoint " + out.path +
                               ": the directory is not empty, and a mount would hide its files");
  }
  return out;
}

bool unmount(const std::string& path) {
  if (::umount2(path.c_str(), UMOUNT_NOFOLLOW) == 0) return true;
  int error = errno;
  if (error == EPERM) error = run_fusermount(path, false);
  if (error == EBUSY) return false;
  if (error == 0) return true;
  throw errno_error(error, path + ": cannot unmount");
}

void detach(const std::string& path, bool abort) {
  const int flags = MNT_DETACH | UMOUNT_NOFOLLOW | (abort ? MNT_FORCE : 0);
  if (::umount2(path.c_str(), flags) == 0) return;
  int error = errno;
  if (error == EPERM) error = run_fusermount(path, true);
  if (error != 0) throw errno_error(error, path + ": cannot detach the mount");
}

void sync_mount(const std::string& path) noexcept {
  const base::UniqueFd root(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (root) (void)::syncfs(root.get());
}

void restore_mountpoint(const Mountpoint& mountpoint) noexcept {
  if (!mountpoint.created) return;
  if (::rmdir(mountpoint.path.c_str()) != 0) {
    base::log_warning("{}: cannot remove the mountpoint: {}", mountpoint.path,
                      base::errno_text(errno));
  }
}

}  // namespace minivmm::fuse
