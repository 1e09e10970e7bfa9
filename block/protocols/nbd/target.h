// SPDX-License-Identifier: Apache-2.0
// Which export of which server an NBD disk is, and how it is reached. Plain data, taken from a
// node's options (QEMU's names) or from a URI.
#pragma once

#include <string>

#include <chrono>

#include "base/nbd_uri.h"
#include "block/graph/options.h"

namespace minivmm::block {

struct NbdTarget {
  // With the export's name. TLS is asked of the server, which has to give it: certificates (a
  // directory as QEMU and libnbd have it: ca-cert.pem, client-cert.pem, client-key.pem) or a
  // pre-shared key.
  base::NbdUri uri;
  // How long requests wait for a server that went away; zero: they fail at once.
  std::chrono::seconds reconnect_delay{0};
  // How long opening may take; further attempts are made until then.
  std::chrono::seconds open_timeout{0};
  // A connection on which nothing is answered for so long, while requests wait, is taken to be
  // broken; zero: never.
  std::chrono::seconds request_timeout{0};
  // The same while the disk is being closed: the request timeout where there is one.
  std::chrono::milliseconds closing_timeout{30'000};
  // The most connections at once, where the server allows several; 0: one for each thread that
  // has requests, up to four.
  unsigned connections = 0;
};

// Takes: uri, or server.type=unix|inet|vsock with server.path, server.host, server.port,
// server.cid, or host and port, or path; export; tls-creds, tls-hostname; reconnect-delay,
// open-timeout, request-timeout (seconds); connections. Throws EINVAL.
NbdTarget take_nbd_target(Options& options);

}  // namespace minivmm::block
