// SPDX-License-Identifier: Apache-2.0
// One end of a QMP socket: ours, QEMU's or its storage daemon's. Blocking.
#pragma once

#include <string>

#include <chrono>
#include <deque>
#include <optional>

#include "base/unique_fd.h"
#include "control/qmp/json.h"

namespace minivmm::cli {

class ControlClient {
 public:
  // Connects and negotiates. `limit`: how long an answer may take; zero: for ever. Throws
  // base::Error that names the path.
  ControlClient(std::string path, std::chrono::milliseconds limit);

  // Sends a message and waits for its answer; events before it are kept. Throws.
  control::qmp::Json ask(const control::qmp::Json& message);
  // The next event; none: the other side has closed the socket. Waits for ever. Throws.
  std::optional<control::qmp::Json> next_event();

 private:
  void send(std::string text);
  std::optional<control::qmp::Json> receive(std::chrono::milliseconds limit);
  control::qmp::Json answer();

  const std::string path_;
  const std::chrono::milliseconds limit_;
  base::UniqueFd socket_;
  std::string waiting_;
  std::deque<control::qmp::Json> events_;
};

}  // namespace minivmm::cli
