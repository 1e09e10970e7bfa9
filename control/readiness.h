// SPDX-License-Identifier: Apache-2.0
// Telling others that the service is up, and where: sd_notify, --ready-fd, --pid-file; and the
// sockets that a service manager hands over. Main thread.
#pragma once

#include <string>

#include <vector>

#include "base/unique_fd.h"

namespace minivmm::control {

// A file with this process's id, removed with the object if it is still ours. Throws EEXIST if it
// names a live process that holds it.
class PidFile {
 public:
  PidFile() = default;
  explicit PidFile(std::string path);
  PidFile(PidFile&& other) noexcept;
  PidFile& operator=(PidFile&& other) noexcept;
  ~PidFile() { remove(); }

  // Removes the file before its time, for an end without destructors.
  void remove() noexcept;

 private:
  std::string path_;
  base::UniqueFd fd_;  // locked for as long as we live
};

// Sends `state` ("READY=1", "STOPPING=1") to $NOTIFY_SOCKET, if there is one.
void notify_service_manager(const std::string& state) noexcept;

// Takes a descriptor that was handed to this process by its number: checks that it is open (EBADF
// otherwise, naming `option`), and keeps it from children. To be called before anything of ours is
// opened, because that might get the number of one that is not.
void take_given_fd(const std::string& option, int fd);

// Writes "READY\n" to the descriptor and closes it, unless it is a standard one: the next file
// opened would get its number, and then the log. Throws if it cannot.
void notify_ready_fd(int fd);

// True for a socket with somebody at its other end.
bool is_connected_socket(int fd) noexcept;

// Standard input as inetd gives it: a connected socket, which is standard output, too. It is
// replaced by /dev/null there. Throws ENOTSOCK.
base::UniqueFd take_standard_socket();

// The listening sockets handed over by the protocol of sd_listen_fds(3) (LISTEN_PID, LISTEN_FDS);
// empty if there are none.
std::vector<int> inherited_sockets();

}  // namespace minivmm::control
