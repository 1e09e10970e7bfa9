// SPDX-License-Identifier: Apache-2.0
// The `minivmm` command: finds the subcommand, runs it, turns errors into text and a status.
#include <fcntl.h>
#include <string>
#include <string_view>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <exception>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "bootdisk/channel.h"
#include "cli/command.h"
#include "cli/image_personality.h"
#include "cli/image_progress.h"

namespace minivmm::cli {
namespace {

constexpr Command kCommands[] = {
    {"boot", "run a guest on disks, and serve the same disks over NBD and FUSE", &run_boot},
    {"serve", "serve disks over NBD and FUSE without a guest", &run_serve},
    {"image", "create, inspect and check disk images (qemu-img's arguments)", &run_image},
    {"nbd", "look at NBD servers, and use their exports as block devices", &run_nbd},
    {"control", "change what a running boot or serve does (QMP)", &run_control},
    {"check-host", "what this machine offers, and what to do about what it lacks", &run_check_host},
};

void print_help(std::FILE* to) {
  fmt::print(to,
             "minivmm serves one live graph of disk images to a KVM guest, to NBD clients and to\n"
             "host tools at the same time.\n\n"
             "Usage: minivmm COMMAND [options]\n\nCommands:\n");
  for (const Command& command : kCommands) {
    fmt::print(to, "  {:<12} {}\n", command.name, command.summary);
  }
  fmt::print(to,
             "\n`minivmm COMMAND --help` teaches each one. `minivmm --version` prints the "
             "version.\n\nA first try:\n"
             "  minivmm image create -f qcow2 disk.qcow2 1G\n"
             "  minivmm serve --disk disk.qcow2 --nbd 'nbd+unix:///?socket=m.sock' "
             "--export disk0,writable\n");
}

int dispatch(const std::vector<std::string>& arguments) {
  if (personality().drop_in) return run_image(arguments);
  if (personality().program == kQemuNbd) return run_qemu_nbd(arguments);
  if (arguments.empty()) {
    print_help(stderr);
    return 1;
  }
  const std::string& first = arguments[0];
  if (first == bootdisk::kFinderCommand) return run_find_kernel();
  if (first == "--help" || first == "-h" || first == "help") {
    print_help(stdout);
    return 0;
  }
  if (first == "--version" || first == "-V" || first == "version") {
    fmt::print("minivmm {}\n", MINIVMM_VERSION);
    return 0;
  }
  for (const Command& command : kCommands) {
    if (command.name == first) return command.run({arguments.begin() + 1, arguments.end()});
  }
  throw UsageError{fmt::format("unknown command '{}'", first)};
}

}  // namespace

std::span<const Command> commands() { return kCommands; }

// A standard descriptor that is closed would be the number of the next file that is opened, and a
// disk image would get the log or the guest's output.
bool occupy_standard_descriptors() {
  for (int fd = 0; fd <= 2; ++fd) {
    if (::fcntl(fd, F_GETFD) >= 0 || errno != EBADF) continue;
    // The lowest free number, which is this one.
    if (::open("/dev/null", O_RDWR) != fd) return false;
  }
  return true;
}

int guarded_main(const std::vector<std::string>& arguments) {
  if (!occupy_standard_descriptors()) return 1;
  // Peers that go away are errors of a write, not the end of the process.
  std::signal(SIGPIPE, SIG_IGN);
  try {
    return dispatch(arguments);
  } catch (const UsageError& e) {
    print_error(e.message);
    const std::string& name = personality().program;
    const std::string help = name != "minivmm"
                                 ? fmt::format("Try '{} --help' for more information", name)
                                 : "Try 'minivmm --help' or 'minivmm COMMAND --help'.";
    fmt::print(stderr, "{}\n", help);
  } catch (const std::exception& e) {
    print_error(e.what());
    end_by_stop_signal();
  }
  return 1;
}

}  // namespace minivmm::cli

int main(int argc, char** argv) {
  if (argc > 0 && minivmm::cli::is_called(argv[0], "qemu-img")) {
    minivmm::cli::set_personality({.program = "qemu-img", .drop_in = true});
  }
  if (argc > 0 && minivmm::cli::is_called(argv[0], minivmm::cli::kQemuNbd)) {
    minivmm::cli::set_personality({.program = minivmm::cli::kQemuNbd});
  }
  return minivmm::cli::guarded_main({argv + (argc > 0 ? 1 : 0), argv + argc});
}
