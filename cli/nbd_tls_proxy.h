// SPDX-License-Identifier: Apache-2.0
// The kernel's NBD driver does no TLS. A device whose server wants it gets local sockets, and a
// process of its own that goes between those and the server, for all of its connections, until they
// have ended: when the device is disconnected, or when the server is gone.
#pragma once

#include <sys/types.h>

#include <optional>
#include <vector>

#include "cli/nbd_attachment.h"

namespace minivmm::cli {

// Where the connections have TLS: starts that process, and puts local sockets in their places.
// Returns its id; it is a child that ends by itself, at the latest soon after the local sockets are
// closed. `keeps_errors`: what it has to say goes where ours goes. The calling process has no other
// threads. Throws.
std::optional<pid_t> start_nbd_tls_proxy(std::vector<NbdAttachment>& attached, bool keeps_errors);

}  // namespace minivmm::cli
