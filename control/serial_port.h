// SPDX-License-Identifier: Apache-2.0
// Where a guest's serial port leads: `--serial stdio|none|file:PATH|pty|unix:PATH`. Owns what was
// opened for it; outlives the machine.
#pragma once

#include <string>

#include <memory>

#include "base/loop_group.h"
#include "base/unique_fd.h"
#include "nbd-server/bind.h"
#include "vmm/machine.h"
#include "vmm/serial_socket.h"

namespace minivmm::control {

class SerialPort {
 public:
  // Throws base::Error that names the option. Plain thread; sockets are bound on a loop's fiber.
  SerialPort(base::LoopGroup& loops, const std::string& spec, bool confine);

  vmm::SerialConfig config() const;

 private:
  void open_file(const std::string& path);
  void open_terminal();

  bool stdio_ = false;
  base::UniqueFd file_;
  base::UniqueFd terminal_;   // our side of a pseudoterminal
  base::UniqueFd kept_open_;  // its other side: without one it would hang up between two users
  nbd::SocketFile socket_file_;
  std::unique_ptr<vmm::SerialSocket> socket_;
};

}  // namespace minivmm::control
