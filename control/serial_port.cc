// SPDX-License-Identifier: Apache-2.0
#include "control/serial_port.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>

#include <fmt/core.h>
#include <termios.h>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::control {

SerialPort::SerialPort(base::LoopGroup& loops, const std::string& spec, bool confine) {
  const auto colon = spec.find(':');
  const std::string kind = spec.substr(0, colon);
  const bool has_path = colon != std::string::npos && colon + 1 < spec.size();
  const std::string path = has_path ? spec.substr(colon + 1) : "";
  try {
    if (spec == "stdio") {
      stdio_ = true;
    } else if (spec == "pty") {
      open_terminal();
    } else if (kind == "file" && has_path) {
      open_file(path);
    } else if (kind == "unix" && has_path) {
      nbd::BoundSocket bound =
          loops.loop(0).call("serial socket", [&] { return nbd::bind_unix(path); });
      socket_file_ = std::move(bound.file);
      socket_ = std::make_unique<vmm::SerialSocket>(std::move(bound.fd), confine);
    } else if (spec != "none") {
      throw base::Error(EINVAL, "stdio, none, pty, file:PATH or unix:PATH is expected");
    }
  } catch (base::Error& error) {
    error.prepend(fmt::format("--serial {}", spec));
    throw;
  }
}

void SerialPort::open_file(const std::string& path) {
  file_.reset(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!file_) throw base::errno_error(errno, "cannot be opened");
}

void SerialPort::open_terminal() {
  terminal_.reset(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
  char name[64];
  if (!terminal_ || ::grantpt(terminal_.get()) != 0 || ::unlockpt(terminal_.get()) != 0 ||
      ::ptsname_r(terminal_.get(), name, sizeof name) != 0) {
    throw base::errno_error(errno, "no pseudoterminal");
  }
  kept_open_.reset(::open(name, O_RDWR | O_NOCTTY | O_CLOEXEC));
  termios settings{};
  if (!kept_open_ || ::tcgetattr(kept_open_.get(), &settings) != 0) {
    throw base::errno_error(errno, fmt::format("{}: cannot be opened", name));
  }
  // The guest edits lines and echoes, not the host.
  ::cfmakeraw(&settings);
  if (::tcsetattr(kept_open_.get(), TCSANOW, &settings) != 0 ||
      ::fcntl(terminal_.get(), F_SETFL, O_RDWR | O_NONBLOCK) != 0) {
    throw base::errno_error(errno, fmt::format("{}: cannot be made raw", name));
  }
  base::log_info("the guest's serial port is {}", name);
}

vmm::SerialConfig SerialPort::config() const {
  vmm::SerialConfig out;
  if (stdio_) {
    out.in_fd = STDIN_FILENO;
    out.out_fd = STDOUT_FILENO;
  } else if (terminal_) {
    out.in_fd = out.out_fd = terminal_.get();
    out.escape = true;
  } else if (socket_) {
    out.in_fd = out.out_fd = socket_->machine_fd();
  } else if (file_) {
    out.out_fd = file_.get();
  }
  return out;
}

}  // namespace minivmm::control
