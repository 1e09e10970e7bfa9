// SPDX-License-Identifier: Apache-2.0
// The fixed newstyle handshake, both sides, on a blocking socket.
#pragma once

#include <string>

#include <cstdint>

namespace minivmm::bench {

struct NbdExport {
  std::uint64_t size = 0;
  std::uint16_t flags = 0;
  bool structured = false;  // replies come as chunks
};

// Client: opens `name` with NBD_OPT_GO. Throws base::Error with the server's refusal.
NbdExport handshake_as_client(int fd, const std::string& name, bool structured);

// Server: offers one export under any name, simple replies only. False: the client left.
bool handshake_as_server(int fd, const NbdExport& offered);

}  // namespace minivmm::bench
