// SPDX-License-Identifier: Apache-2.0
// Listening sockets. Fiber: they are made as errands (base/pool.h), also while the loops have
// filters; what is in the way (the socket of a dead process, a port whose last user is just ending)
// is waited for up to about two seconds.
#pragma once

#include <string>
#include <sys/types.h>

#include "base/unique_fd.h"
#include "nbd-server/uri.h"

namespace minivmm::nbd {

// The file of a unix socket that we made; removed at the end if it is still that one.
class SocketFile {
 public:
  SocketFile() = default;
  SocketFile(std::string path, dev_t device, ino_t inode) noexcept
      : path_(std::move(path)), device_(device), inode_(inode) {}
  SocketFile(SocketFile&& other) noexcept { *this = std::move(other); }
  SocketFile& operator=(SocketFile&& other) noexcept;
  ~SocketFile() { remove(); }

  void remove() noexcept;

 private:
  std::string path_;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

struct BoundSocket {
  base::UniqueFd fd;  // listening, non-blocking
  Uri address;        // without an export name; the port is the real one
  SocketFile file;    // of a unix socket
  bool tcp = false;   // or vsock: others may reach it
};

// Listens on a unix socket that only this user can connect to (mode 0600). The file appears when
// clients can connect. Throws EADDRINUSE naming the path where a process listens there, EEXIST
// where it is something else than a socket.
BoundSocket bind_unix(const std::string& path);

// Listens on a TCP address; on loopback where `address.host` is empty. Throws EACCES where the
// address is beyond loopback and `allow_remote` is false.
BoundSocket bind_tcp(const Uri& address, bool allow_remote);

// Listens on a vsock address; VMADDR_CID_ANY (4294967295) is every one of this machine's. Throws
// EACCES where it is reachable from elsewhere and `allow_remote` is false.
BoundSocket bind_vsock(const Uri& address, bool allow_remote);

// Takes over a socket that listens already. Throws EINVAL for anything else.
BoundSocket adopt(base::UniqueFd fd);

}  // namespace minivmm::nbd
