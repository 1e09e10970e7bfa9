// SPDX-License-Identifier: Apache-2.0
// The program called as qemu-nbd: what is asked of it, and the pieces that do it.
#pragma once

#include <string>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "base/nbd_uri.h"
#include "control/config.h"

namespace minivmm::cli {

struct QemuNbdRequest {
  std::string file;
  std::string format, cache, aio, snapshot, socket, name, description, pid_file;
  std::string tls_creds, tls_authz, tls_hostname;
  std::string detect_zeroes = "off";
  std::string device;  // of -c and -d
  std::vector<std::string> bitmaps;
  std::string bind = "0.0.0.0";
  bool bind_given = false;
  uint16_t port = base::kNbdPort;
  unsigned shared = 1;
  uint64_t offset = 0;
  bool discard = false, allocation_depth = false;
  bool read_only = false, temporary = false, image_opts = false;
  bool persistent = false, verbose = false, list = false, fork = false;
  bool disconnect = false;
};

// False: it was all said (--help), or getopt has said what is wrong: `status` is how to end. Throws
// what is wrong in qemu-nbd's words, UsageError where those point to --help.
bool parse_qemu_nbd(const std::vector<std::string>& arguments, QemuNbdRequest& out, int& status);

base::NbdUri qemu_nbd_address(const QemuNbdRequest& wanted);

// A run of the daemon. Throws.
control::Config qemu_nbd_config(const QemuNbdRequest& wanted);

// -L, in qemu-nbd's form. Returns the exit status.
int list_qemu_nbd(const QemuNbdRequest& wanted);

// -c and -d: the kernel's devices.
int connect_qemu_nbd(const QemuNbdRequest& wanted, control::Config config);
int disconnect_qemu_nbd(const QemuNbdRequest& wanted);

// A daemon in a process of its own.
struct ForkedDaemon {
  control::Config config;
  bool keeps_terminal = false;
  // In the child, before the daemon and after it.
  std::function<void()> at_start = [] {};
  std::function<void()> at_end = [] {};
};
// What it says on standard error is passed on until it serves; from then on it is alone, unless it
// keeps the terminal. Returns its process id; nothing where it has ended instead, having said why.
std::optional<int> fork_daemon(ForkedDaemon wanted);

}  // namespace minivmm::cli
