// SPDX-License-Identifier: Apache-2.0
// Sockets of the measuring tools: NBD addresses, and whole messages for the handshake.
#pragma once

#include <string>

#include <cstddef>

#include "base/unique_fd.h"

namespace minivmm::bench {

// nbd+unix:///NAME?socket=PATH or nbd://HOST[:PORT]/NAME
struct NbdAddress {
  std::string path;  // of a unix socket; else empty
  std::string host;
  std::string port;
  std::string export_name;
};

// Throws base::Error (EINVAL) on any other form.
NbdAddress parse_nbd_uri(const std::string& uri);

// A connected blocking stream socket (TCP: without delay).
base::UniqueFd connect_to(const NbdAddress& address);
// A listening one; an old unix socket at the path is replaced.
base::UniqueFd listen_at(const NbdAddress& address);
// What both sides set on a stream: large unix socket buffers, no delay on TCP.
void tune_stream(int fd);

// The whole buffer, or base::Error (ECONNRESET when the peer ends early).
void send_all(int fd, const void* data, std::size_t size);
void recv_all(int fd, void* data, std::size_t size);

}  // namespace minivmm::bench
