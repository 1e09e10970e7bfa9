// SPDX-License-Identifier: Apache-2.0
// Socket addresses as people write them.
#pragma once

#include <string>
#include <sys/socket.h>

#include "nbd-server/uri.h"

namespace minivmm::nbd {

// True for 127.0.0.0/8, ::1 and unix sockets.
bool is_loopback(const sockaddr_storage& address) noexcept;

// The address that a listening socket is bound to. Throws EINVAL for families that have no URI.
Uri uri_of_socket(int fd);

// Who is at the other end of a connected socket: "process 4711" (unix), "[::1]:52011".
std::string peer_text(int fd);

// Whose connection it is, whichever of his: "::1", "user 1000". Empty where that is not known.
std::string peer_key(int fd);

}  // namespace minivmm::nbd
