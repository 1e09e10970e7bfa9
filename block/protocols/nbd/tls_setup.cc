// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/tls_setup.h"

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::block {
namespace {

// What this libnbd would not check is not done unchecked.
void check_verification(const Libnbd& nbd, const base::NbdUri& uri) {
  if (nbd.set_tls_hostname != nullptr) return;
  if (!uri.tls_hostname.empty()) {
    throw base::Error(ENOTSUP, "option 'tls-hostname' needs libnbd 1.22 or later");
  }
  const bool certificates = uri.psk_file.empty();
  if (certificates && uri.verify_peer && (uri.is_unix() || uri.is_vsock())) {
    throw base::Error(ENOTSUP, fmt::format("{}: libnbd before 1.22 does not check a server's "
                                           "certificate here: take a pre-shared key, or say "
                                           "verify-peer=off (in a URI tls-verify-peer=false)",
                                           uri.text()));
  }
}

}  // namespace

bool set_up_tls(const Libnbd& nbd, nbd_handle* handle, const base::NbdUri& uri) {
  if (!uri.tls) return nbd.set_tls(handle, LIBNBD_TLS_DISABLE) == 0;
  check_verification(nbd, uri);
  return nbd.set_tls(handle, LIBNBD_TLS_REQUIRE) == 0 &&
         nbd.set_tls_verify_peer(handle, uri.verify_peer) == 0 &&
         (uri.tls_hostname.empty() ||
          nbd.set_tls_hostname(handle, uri.tls_hostname.c_str()) == 0) &&
         (uri.user.empty() || nbd.set_tls_username(handle, uri.user.c_str()) == 0) &&
         (uri.certificates.empty() ||
          nbd.set_tls_certificates(handle, uri.certificates.c_str()) == 0) &&
         (uri.psk_file.empty() || nbd.set_tls_psk_file(handle, uri.psk_file.c_str()) == 0);
}

}  // namespace minivmm::block
