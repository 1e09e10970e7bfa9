// SPDX-License-Identifier: Apache-2.0
// The program called as qemu-nbd: its options turned into a run of the daemon, in this process or
// in a child.
#include "cli/qemu_nbd.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <exception>
#include <optional>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "base/unique_fd.h"
#include "cli/command.h"
#include "cli/image_personality.h"
#include "control/daemon.h"

namespace minivmm::cli {
namespace {

// What the child writes to its standard error is passed on until it serves, or has ended.
bool wait_until_it_serves(int ready, int errors) {
  pollfd fds[] = {{ready, POLLIN, 0}, {errors, POLLIN, 0}};
  std::optional<bool> serves;
  // Once that is known, what it had said before is taken without waiting.
  while (::poll(fds, 2, serves ? 0 : -1) > 0) {
    char text[512];
    if (fds[1].revents != 0) {
      const ssize_t n = ::read(errors, text, sizeof text);
      if (n > 0 && ::write(STDERR_FILENO, text, static_cast<size_t>(n)) < 0) fds[1].fd = -1;
      if (n <= 0) fds[1].fd = -1;
    }
    if (fds[0].revents != 0) {
      serves = ::read(ready, text, sizeof text) > 0;
      fds[0].fd = -1;
    }
  }
  return serves.value_or(false);
}

// Alone from the moment in which it serves: its output goes nowhere then.
void leave_the_terminal(int errors) {
  ::setsid();
  const base::UniqueFd nothing(::open("/dev/null", O_RDWR | O_CLOEXEC));
  ::dup2(nothing.get(), STDIN_FILENO);
  ::dup2(nothing.get(), STDOUT_FILENO);
  ::dup2(errors, STDERR_FILENO);
}

int run_child(control::Config config) {
  try {
    return control::Daemon(std::move(config)).run();
  } catch (const std::exception& e) {
    print_error(e.what());
    return 1;
  }
}

}  // namespace

std::optional<int> fork_daemon(ForkedDaemon wanted) {
  int ready[2];
  int errors[2];
  if (::pipe2(ready, O_CLOEXEC) != 0 || ::pipe2(errors, O_CLOEXEC) != 0) {
    throw base::errno_error(errno, "--fork");
  }
  const pid_t child = ::fork();
  if (child < 0) throw base::errno_error(errno, "--fork");
  if (child == 0) {
    ::close(ready[0]);
    ::close(errors[0]);
    if (!wanted.keeps_terminal) leave_the_terminal(errors[1]);
    ::close(errors[1]);
    wanted.at_start();
    wanted.config.ready_fd = ready[1];
    const int status = run_child(std::move(wanted.config));
    wanted.at_end();
    // Not the rest of what the parent does.
    ::_exit(status);
  }
  const base::UniqueFd ready_end(ready[0]);
  const base::UniqueFd errors_end(errors[0]);
  ::close(ready[1]);
  ::close(errors[1]);
  if (wait_until_it_serves(ready[0], errors[0])) return child;
  int status = 0;
  ::waitpid(child, &status, 0);
  return std::nullopt;
}

int run_qemu_nbd(const std::vector<std::string>& arguments) {
  QemuNbdRequest wanted;
  int status = 0;
  try {
    if (!parse_qemu_nbd(arguments, wanted, status)) return status;
  } catch (const UsageError& e) {
    print_error(e.message + "\nTry `qemu-nbd --help' for more information.");
    return 1;
  }
  base::set_log_level(wanted.verbose ? base::LogLevel::kDebug : base::LogLevel::kWarning);
  if (wanted.list) return list_qemu_nbd(wanted);
  if (wanted.disconnect) return disconnect_qemu_nbd(wanted);
  control::Config config = qemu_nbd_config(wanted);
  if (!wanted.device.empty()) return connect_qemu_nbd(wanted, std::move(config));
  if (!wanted.fork) return control::Daemon(std::move(config)).run();
  return fork_daemon({.config = std::move(config)}) ? 0 : 1;
}

}  // namespace minivmm::cli
