// SPDX-License-Identifier: Apache-2.0
// A connection to an NBD server that has entered transmission with simple replies, which is what
// the kernel's driver goes on with; with TLS by way of a proxy (nbd_tls_proxy.h). Blocking.
#pragma once

#include <string>

#include <chrono>
#include <cstdint>
#include <memory>

#include "base/nbd_uri.h"
#include "base/unique_fd.h"
#include "nbd-server/tls_session.h"

namespace minivmm::cli {

struct NbdAttachment {
  base::UniqueFd socket;
  uint64_t size = 0;
  uint16_t flags = 0;          // of transmission
  uint32_t minimum_block = 1;  // bytes
  // What goes through the socket, where the address says TLS.
  std::unique_ptr<nbd::TlsSession> tls = {};
};

// What a server may take for each step of a connection.
inline constexpr std::chrono::seconds kNbdConnectLimit{30};

// Throws what went wrong, or what the server said. `credentials` are what the address says
// (nbd_credentials()), null without TLS.
NbdAttachment attach_to_nbd(const base::NbdUri& uri, std::chrono::seconds limit,
                            const std::shared_ptr<const nbd::TlsCredentials>& credentials = {});

// The same over a socket that is connected already.
NbdAttachment attach_over(base::UniqueFd connected, const std::string& export_name);

}  // namespace minivmm::cli
