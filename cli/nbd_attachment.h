// SPDX-License-Identifier: Apache-2.0
// A connection to an NBD server that has entered transmission with simple replies, which is what
// the kernel's driver goes on with. Blocking.
#pragma once

#include <string>

#include <chrono>
#include <cstdint>

#include "base/nbd_uri.h"
#include "base/unique_fd.h"

namespace minivmm::cli {

struct NbdAttachment {
  base::UniqueFd socket;
  uint64_t size = 0;
  uint16_t flags = 0;          // of transmission
  uint32_t minimum_block = 1;  // bytes
};

// What a server may take for each step of a connection.
inline constexpr std::chrono::seconds kNbdConnectLimit{30};

// Throws ENOTSUP, saying what to do instead, for an address with TLS.
void refuse_tls(const base::NbdUri& uri);

// Throws what the server or the system said; ENOTSUP for TLS, which the kernel does not do.
NbdAttachment attach_to_nbd(const base::NbdUri& uri, std::chrono::seconds limit);

// The same over a socket that is connected already.
NbdAttachment attach_over(base::UniqueFd connected, const std::string& export_name);

}  // namespace minivmm::cli
