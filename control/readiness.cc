// SPDX-License-Identifier: Apache-2.0
#include "control/readiness.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::control {

PidFile::PidFile(std::string path) : path_(std::move(path)) {
  if (path_.empty()) return;
  base::UniqueFd fd(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!fd) throw base::errno_error(errno, fmt::format("--pid-file {}", path_));
  // The lock tells a live owner from a file that a crash left.
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    const std::string path_text = std::exchange(path_, {});
    throw base::Error(
        EEXIST, fmt::format("--pid-file {}: is held by another process that runs", path_text));
  }
  const std::string text = fmt::format("{}\n", ::getpid());
  if (::ftruncate(fd.get(), 0) != 0 ||
      ::write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    throw base::errno_error(errno, fmt::format("--pid-file {}", path_));
  }
  fd_ = std::move(fd);
}

PidFile::PidFile(PidFile&& other) noexcept
    : path_(std::exchange(other.path_, {})), fd_(std::move(other.fd_)) {}

PidFile& PidFile::operator=(PidFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  return *this;
}

void PidFile::remove() noexcept {
  if (!fd_) return;
  struct stat ours {};
  struct stat now {};
  if (::fstat(fd_.get(), &ours) == 0 && ::stat(path_.c_str(), &now) == 0 &&
      ours.st_ino == now.st_ino && ours.st_dev == now.st_dev) {
    ::unlink(path_.c_str());
  }
  fd_.reset();
}

void notify_service_manager(const std::string& state) noexcept {
  const char* path = std::getenv("NOTIFY_SOCKET");
  if (path == nullptr || (path[0] != '/' && path[0] != '@')) return;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const size_t length = std::strlen(path);
  if (length >= sizeof address.sun_path) return;
  std::memcpy(address.sun_path, path, length);
  if (address.sun_path[0] == '@') address.sun_path[0] = '\0';
  const base::UniqueFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + length);
  if (!fd || ::sendto(fd.get(), state.data(), state.size(), MSG_NOSIGNAL,
                      reinterpret_cast<const sockaddr*>(&address), size) < 0) {
    base::log_warning("NOTIFY_SOCKET {}: {}", path, base::errno_text(errno));
  }
}

void take_given_fd(const std::string& option, int fd) {
  if (::fcntl(fd, F_GETFD) < 0) {
    throw base::errno_error(errno, fmt::format("{}: descriptor {} is not open", option, fd));
  }
  if (fd > STDERR_FILENO) (void)::fcntl(fd, F_SETFD, FD_CLOEXEC);
}

void notify_ready_fd(int fd) {
  const base::UniqueFd closed_after(fd > STDERR_FILENO ? fd : -1);
  constexpr char kText[] = "READY\n";
  if (::write(fd, kText, sizeof kText - 1) != static_cast<ssize_t>(sizeof kText - 1)) {
    throw base::errno_error(errno, fmt::format("--ready-fd {}", fd));
  }
}

std::vector<int> inherited_sockets() {
  const char* pid = std::getenv("LISTEN_PID");
  const char* count = std::getenv("LISTEN_FDS");
  std::vector<int> fds;
  if (pid == nullptr || count == nullptr || std::atol(pid) != ::getpid()) return fds;
  constexpr int kFirst = 3;  // SD_LISTEN_FDS_START
  const int n = std::atoi(count);
  for (int i = 0; i < n && i < 64; ++i) fds.push_back(kFirst + i);
  return fds;
}

bool is_connected_socket(int fd) noexcept {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  return ::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &length) == 0;
}

base::UniqueFd take_standard_socket() {
  if (!is_connected_socket(STDIN_FILENO)) {
    throw base::Error(ENOTSOCK,
                      "--nbd stdio: standard input is not a connected socket, as inetd "
                      "gives it");
  }
  base::UniqueFd out(::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3));
  const base::UniqueFd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!out || !nothing) throw base::errno_error(errno, "--nbd stdio");
  const bool both = is_connected_socket(STDOUT_FILENO);
  ::dup2(nothing.get(), STDIN_FILENO);
  if (both) ::dup2(nothing.get(), STDOUT_FILENO);
  return out;
}

}  // namespace minivmm::control
