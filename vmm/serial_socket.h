// SPDX-License-Identifier: Apache-2.0
// A guest's serial port behind a listening socket: one client at a time, and what the guest wrote
// while there was none (its newest 64 KiB) for the next one. Bytes pass as they are, both ways. A
// thread of its own; the machine sees one end of a pair of sockets.
//
// A client that takes nothing holds the guest's output up as a full pipe does; see Console.
#pragma once

#include <atomic>
#include <cstddef>
#include <deque>
#include <thread>
#include <vector>

#include "base/unique_fd.h"

namespace minivmm::vmm {

class SerialSocket {
 public:
  static constexpr size_t kKeptBytes = 65536;

  // `listening` is a socket that listens, non-blocking. Throws base::Error where a descriptor or
  // the thread cannot be made.
  SerialSocket(base::UniqueFd listening, bool confine);
  // Hands the client what is left, for at most a second.
  ~SerialSocket();
  SerialSocket(const SerialSocket&) = delete;
  SerialSocket& operator=(const SerialSocket&) = delete;

  // For both directions of a SerialConfig; lives as long as this object.
  int machine_fd() const noexcept { return machine_end_.get(); }

 private:
  void loop();
  void accept_client();
  void from_machine();
  void from_client();
  void to_client();
  void to_machine();
  void drop_client() noexcept;

  const base::UniqueFd listening_;
  const bool confine_;
  base::UniqueFd machine_end_;
  base::UniqueFd our_end_;
  base::UniqueFd wake_;
  std::thread thread_;
  std::atomic<bool> stopping_{false};
  // The thread's own.
  base::UniqueFd client_;
  std::deque<std::byte> kept_;    // from the machine
  std::vector<std::byte> typed_;  // from the client
};

}  // namespace minivmm::vmm
