// SPDX-License-Identifier: Apache-2.0
// What the files about TLS share: GnuTLS's handles, and errors with its texts.
#pragma once

#include <string>

#include "nbd-server/gnutls.h"
#include "nbd-server/tls.h"

namespace minivmm::nbd {

struct TlsCredentials::Handles {
  Handles() = default;
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles();

  gnutls_certificate_credentials_t certificates = nullptr;
  gnutls_psk_server_credentials_t keys = nullptr;
  gnutls_psk_client_credentials_t key = nullptr;  // a client's
  gnutls_priority_t priority = nullptr;
};

// What both ends take if nothing is said.
std::string usual_tls_priority(TlsOptions::Kind kind, bool client);

// Throws ENOENT naming it.
void require_tls_file(const std::string& path);

// Throws EACCES with GnuTLS's text if `status` is an error.
void require_tls(int status, const std::string& what);

}  // namespace minivmm::nbd
