// SPDX-License-Identifier: Apache-2.0
#include "control/finder_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include <fmt/core.h>
#include <spawn.h>

#include "base/error.h"
#include "bootdisk/channel.h"

namespace minivmm::control {

using base::errno_error;

namespace {

// For one answer; the child's CPU time is bounded besides.
constexpr timeval kPatience{60, 0};

base::UniqueFd memory_file(const char* name) {
  base::UniqueFd fd(::memfd_create(name, MFD_CLOEXEC));
  if (!fd) throw errno_error(errno, "memfd");
  return fd;
}

// Out of the way of the numbers that the child is to have them under.
base::UniqueFd moved_up(int fd) {
  base::UniqueFd out(::fcntl(fd, F_DUPFD_CLOEXEC, bootdisk::kInitrdFd + 1));
  if (!out) throw errno_error(errno, "descriptors");
  return out;
}

class SpawnSettings {
 public:
  SpawnSettings() {
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawnattr_init(&attributes);
    sigset_t none;
    sigset_t defaults;
    sigemptyset(&none);
    sigemptyset(&defaults);
    sigaddset(&defaults, SIGPIPE);
    ::posix_spawnattr_setsigmask(&attributes, &none);
    ::posix_spawnattr_setsigdefault(&attributes, &defaults);
    ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  }
  ~SpawnSettings() {
    ::posix_spawn_file_actions_destroy(&actions);
    ::posix_spawnattr_destroy(&attributes);
  }
  SpawnSettings(const SpawnSettings&) = delete;
  SpawnSettings& operator=(const SpawnSettings&) = delete;

  posix_spawn_file_actions_t actions{};
  posix_spawnattr_t attributes{};
};

}  // namespace

FinderProcess::FinderProcess()
    : kernel_(memory_file("minivmm kernel")), initrd_(memory_file("minivmm initrd")) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    throw errno_error(errno, "socketpair");
  }
  channel_.reset(ends[0]);
  const base::UniqueFd far_end(ends[1]);
  ::setsockopt(channel(), SOL_SOCKET, SO_RCVTIMEO, &kPatience, sizeof kPatience);
  ::setsockopt(channel(), SOL_SOCKET, SO_SNDTIMEO, &kPatience, sizeof kPatience);

  const base::UniqueFd far = moved_up(far_end.get());
  const base::UniqueFd kernel = moved_up(kernel_.get());
  const base::UniqueFd initrd = moved_up(initrd_.get());
  SpawnSettings settings;
  int err = ::posix_spawn_file_actions_addopen(&settings.actions, 0, "/dev/null", O_RDONLY, 0);
  for (const auto& [from, to] : {std::pair{far.get(), bootdisk::kChannelFd},
                                 {kernel.get(), bootdisk::kKernelFd},
                                 {initrd.get(), bootdisk::kInitrdFd}}) {
    if (err == 0) err = ::posix_spawn_file_actions_adddup2(&settings.actions, from, to);
  }
  std::string name = "minivmm";
  std::string command = bootdisk::kFinderCommand;
  char* arguments[] = {name.data(), command.data(), nullptr};
  char* environment[] = {nullptr};
  if (err == 0) {
    err = ::posix_spawn(&pid_, "/proc/self/exe", &settings.actions, &settings.attributes, arguments,
                        environment);
  }
  if (err != 0) throw errno_error(err, "the search for a kernel on the disk cannot be started");
}

FinderProcess::~FinderProcess() {
  if (pid_ > 0) {
    ::kill(pid_, SIGKILL);
    (void)end();
  }
}

std::string FinderProcess::end() {
  int status = 0;
  pid_t result = -1;
  do {
    result = ::waitpid(pid_, &status, 0);
  } while (result < 0 && errno == EINTR);
  pid_ = -1;
  if (result < 0) return "it ended";
  if (WIFSIGNALED(status)) return fmt::format("it was ended by signal {}", WTERMSIG(status));
  return fmt::format("it ended with status {}", WEXITSTATUS(status));
}

}  // namespace minivmm::control
