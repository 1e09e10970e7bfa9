// SPDX-License-Identifier: Apache-2.0
#include "tests/system/qemu_guest.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <stdexcept>

#include <spawn.h>

#include "base/unique_fd.h"

extern char** environ;

namespace minivmm::test {
namespace {

struct Pipe {
  Pipe() {
    int fds[2];
    if (::pipe2(fds, O_CLOEXEC) != 0) throw std::runtime_error("pipe2");
    read.reset(fds[0]);
    write.reset(fds[1]);
  }
  base::UniqueFd read;
  base::UniqueFd write;
};

pid_t spawn(const std::vector<std::string>& arguments, int in, int out) {
  std::vector<char*> argv;
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, in, STDIN_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, out, STDERR_FILENO);
  pid_t pid = -1;
  const int err = ::posix_spawn(&pid, argv[0], &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (err != 0) throw std::runtime_error("cannot start " + arguments[0]);
  return pid;
}

}  // namespace

bool qemu_exists() { return std::string(MINIVMM_QEMU) != ""; }

std::vector<std::string> qemu_disk(const std::string& path, const std::string& device_options) {
  return {"-drive", "if=none,id=d,format=raw,discard=unmap,file=" + path, "-device",
          "virtio-blk-device,drive=d" + device_options};
}

QemuResult run_qemu(const std::string& command_line, const std::vector<std::string>& arguments,
                    int seconds, const std::string& input) {
  std::vector<std::string> all = {MINIVMM_QEMU,
                                  "-M",
                                  "microvm,acpi=off",
                                  "-accel",
                                  "tcg",
                                  "-m",
                                  "128",
                                  "-nodefaults",
                                  "-no-user-config",
                                  "-display",
                                  "none",
                                  "-no-reboot",
                                  "-serial",
                                  "stdio",
                                  "-device",
                                  "isa-debug-exit,iobase=0xf4,iosize=4",
                                  "-global",
                                  "virtio-mmio.force-legacy=false",
                                  "-kernel",
                                  MINIVMM_PROBE_ELF,
                                  "-append",
                                  command_line};
  all.insert(all.end(), arguments.begin(), arguments.end());
  Pipe in;
  Pipe out;
  const pid_t pid = spawn(all, in.read.get(), out.write.get());
  out.write.reset();
  QemuResult result;
  bool typed = input.empty();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  bool killed = false;
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    pollfd wait{out.read.get(), POLLIN, 0};
    if (left.count() <= 0 || ::poll(&wait, 1, static_cast<int>(left.count())) == 0) {
      ::kill(pid, SIGKILL);
      killed = true;
      break;
    }
    std::array<char, 4096> buffer;
    const ssize_t n = ::read(out.read.get(), buffer.data(), buffer.size());
    if (n <= 0) break;
    result.output.append(buffer.data(), static_cast<size_t>(n));
    if (!typed && result.output.find("probe: shell\n") != std::string::npos) {
      typed = true;
      (void)!::write(in.write.get(), input.data(), input.size());
    }
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  if (!killed && WIFEXITED(status)) {
    result.exit_code = WEXITSTATUS(status);
    // isa-debug-exit makes (value << 1) | 1 of the guest's value.
    if ((result.exit_code & 1) != 0) result.status = result.exit_code >> 1;
  }
  return result;
}

}  // namespace minivmm::test
