// SPDX-License-Identifier: Apache-2.0
// What a client shows and asks for.
#include <string>
#include <string_view>

#include <cerrno>
#include <filesystem>
#include <fstream>

#include <fmt/core.h>

#include "base/error.h"
#include "nbd-server/tls_handles.h"

namespace minivmm::nbd {

using base::Error;

namespace {

// The hexadecimal key of a line "USER:HEX". Throws.
std::string find_key(const std::string& path, const std::string& user) {
  require_tls_file(path);
  std::ifstream file(path);
  if (!file) throw base::errno_error(errno, fmt::format("TLS: {}", path));
  for (std::string line; std::getline(file, line);) {
    if (line.ends_with('\r')) line.pop_back();
    const size_t colon = line.rfind(':');
    if (colon != line.npos && std::string_view(line).substr(0, colon) == user) {
      return line.substr(colon + 1);
    }
  }
  throw Error(EACCES, fmt::format("TLS: {}: holds no key for '{}'", path, user));
}

}  // namespace

TlsCredentials::TlsCredentials(const TlsClientOptions& options)
    : options_{.kind = options.kind,
               .directory = options.directory,
               .verify_peer = options.verify_peer},
      is_client_(true),
      host_(options.host) {
  (void)gnutls_api();
  handles_ = std::make_unique<Handles>();
  const std::string priority = usual_tls_priority(options_.kind, /*client=*/true);
  require_tls(gnutls_api().priority_init(&handles_->priority, priority.c_str(), nullptr),
              "priority " + priority);
  if (options_.kind == TlsOptions::Kind::kPsk) {
    load_client_key(options);
  } else {
    load_client_certificates();
  }
}

void TlsCredentials::load_client_certificates() {
  const GnutlsApi& api = gnutls_api();
  require_tls(api.certificate_allocate_credentials(&handles_->certificates), "credentials");
  gnutls_certificate_credentials_t out = handles_->certificates;
  if (options_.directory.empty()) {
    require_tls(api.certificate_set_x509_system_trust(out), "the system's authorities");
    return;
  }
  load_authority();
  const std::string certificate = options_.directory + "/client-cert.pem";
  const std::string key = options_.directory + "/client-key.pem";
  // The server may want none.
  if (std::error_code error; !std::filesystem::exists(certificate, error) && !error) return;
  require_tls_file(key);
  require_tls(
      api.certificate_set_x509_key_file(out, certificate.c_str(), key.c_str(), GNUTLS_X509_FMT_PEM),
      certificate + " with " + key);
}

void TlsCredentials::load_client_key(const TlsClientOptions& options) {
  const GnutlsApi& api = gnutls_api();
  std::string key = find_key(options.key_file, options.user);
  require_tls(api.psk_allocate_client_credentials(&handles_->key), "credentials");
  const gnutls_datum_t datum{reinterpret_cast<unsigned char*>(key.data()),
                             static_cast<unsigned>(key.size())};
  require_tls(api.psk_set_client_credentials(handles_->key, options.user.c_str(), &datum,
                                             GNUTLS_PSK_KEY_HEX),
              options.key_file);
}

}  // namespace minivmm::nbd
