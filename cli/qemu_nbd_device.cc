// SPDX-License-Identifier: Apache-2.0
// qemu-nbd -c and -d: an image as a block device of this machine. A child serves it to the one
// connection that the kernel has, and ends with that.
#include <fcntl.h>
#include <string>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <exception>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/unique_fd.h"
#include "cli/image_personality.h"
#include "cli/nbd_device.h"
#include "cli/qemu_nbd.h"

namespace minivmm::cli {

using base::Error;

namespace {

// By which the server finds its own device again.
std::string backend_of(int server) { return fmt::format("qemu-nbd {}", server); }

// In the server, when it ends: a device without a server would answer nothing.
void end_own_device(uint32_t index) {
  try {
    if (!is_nbd_backend(index, backend_of(::getpid()))) return;
    GenericNetlink kernel = nbd_driver();
    disconnect_nbd_device(kernel, index);
  } catch (const std::exception& e) {
    print_error(e.what());
  }
}

std::atomic<int> server_to_end{0};

// In the foreground until the device has ended, or a signal ends it.
int stay_with(int server) {
  server_to_end = server;
  for (const int number : {SIGTERM, SIGHUP, SIGINT}) {
    std::signal(number, [](int) { (void)::kill(server_to_end, SIGTERM); });
  }
  int status = 0;
  while (::waitpid(server, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace

int connect_qemu_nbd(const QemuNbdRequest& wanted, control::Config config) {
  const uint32_t index = nbd_device_number(wanted.device);
  GenericNetlink kernel = nbd_driver();
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) {
    throw base::errno_error(errno, "a pair of sockets");
  }
  base::UniqueFd ours(pair[0]);
  base::UniqueFd theirs(pair[1]);
  config.nbd.push_back({.uri = {}, .fd = theirs.get()});
  const std::optional<int> server = fork_daemon({.config = std::move(config),
                                                 .keeps_terminal = wanted.verbose,
                                                 .at_start = [&ours] { ours.reset(); },
                                                 .at_end = [index] { end_own_device(index); }});
  if (!server) return 1;
  theirs.reset();
  try {
    std::vector<NbdAttachment> attached;
    attached.push_back(attach_over(std::move(ours), wanted.name));
    NbdDeviceOptions options;
    options.index = index;
    options.backend = backend_of(*server);
    (void)connect_nbd_device(kernel, options, attached);
  } catch (const std::exception&) {
    ::kill(*server, SIGTERM);
    ::waitpid(*server, nullptr, 0);
    throw;
  }
  if (!wanted.verbose) return 0;
  fmt::print(stderr, "NBD device {} is now connected to {}\n", wanted.device, wanted.file);
  return stay_with(*server);
}

int disconnect_qemu_nbd(const QemuNbdRequest& wanted) {
  base::UniqueFd device(::open(wanted.device.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!device) {
    throw Error(errno, fmt::format("Cannot open {}: {}", wanted.device, base::errno_text(errno)));
  }
  // Whoever has it open keeps it.
  device.reset();
  const uint32_t index = nbd_device_number(wanted.device);
  GenericNetlink kernel = nbd_driver();
  if (is_nbd_connected(index)) disconnect_nbd_device(kernel, index);
  fmt::print("{} disconnected\n", wanted.device);
  return 0;
}

}  // namespace minivmm::cli
