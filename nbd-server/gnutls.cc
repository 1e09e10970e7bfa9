// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/gnutls.h"

#include "base/shared_library.h"

namespace minivmm::nbd {
namespace {

GnutlsApi load() {
  const base::SharedLibrary library("libgnutls.so.30", "TLS needs GnuTLS 3.7 or later",
                                    "libgnutls30");
  GnutlsApi out{};
  library.find("gnutls_strerror", out.strerror);
  library.find("gnutls_certificate_allocate_credentials", out.certificate_allocate_credentials);
  library.find("gnutls_certificate_free_credentials", out.certificate_free_credentials);
  library.find("gnutls_certificate_set_x509_trust_file", out.certificate_set_x509_trust_file);
  library.find("gnutls_certificate_set_x509_system_trust", out.certificate_set_x509_system_trust);
  library.find("gnutls_certificate_set_x509_crl_file", out.certificate_set_x509_crl_file);
  library.find("gnutls_certificate_set_x509_key_file", out.certificate_set_x509_key_file);
  library.find("gnutls_certificate_server_set_request", out.certificate_server_set_request);
  library.find("gnutls_certificate_get_peers", out.certificate_get_peers);
  library.find("gnutls_psk_allocate_server_credentials", out.psk_allocate_server_credentials);
  library.find("gnutls_psk_free_server_credentials", out.psk_free_server_credentials);
  library.find("gnutls_psk_set_server_credentials_file", out.psk_set_server_credentials_file);
  library.find("gnutls_psk_server_get_username", out.psk_server_get_username);
  library.find("gnutls_psk_allocate_client_credentials", out.psk_allocate_client_credentials);
  library.find("gnutls_psk_free_client_credentials", out.psk_free_client_credentials);
  library.find("gnutls_psk_set_client_credentials", out.psk_set_client_credentials);
  library.find("gnutls_priority_init", out.priority_init);
  library.find("gnutls_priority_deinit", out.priority_deinit);
  library.find("gnutls_priority_set", out.priority_set);
  library.find("gnutls_init", out.init);
  library.find("gnutls_deinit", out.deinit);
  library.find("gnutls_credentials_set", out.credentials_set);
  library.find("gnutls_session_set_verify_cert", out.session_set_verify_cert);
  library.find("gnutls_server_name_set", out.server_name_set);
  library.find("gnutls_transport_set_ptr", out.transport_set_ptr);
  library.find("gnutls_transport_set_pull_function", out.transport_set_pull_function);
  library.find("gnutls_transport_set_push_function", out.transport_set_push_function);
  library.find("gnutls_transport_set_errno", out.transport_set_errno);
  library.find("gnutls_handshake", out.handshake);
  library.find("gnutls_alert_get", out.alert_get);
  library.find("gnutls_alert_get_name", out.alert_get_name);
  library.find("gnutls_alert_send_appropriate", out.alert_send_appropriate);
  library.find("gnutls_session_get_verify_cert_status", out.session_get_verify_cert_status);
  library.find("gnutls_certificate_verification_status_print",
               out.certificate_verification_status_print);
  library.find("gnutls_free", out.free);
  library.find("gnutls_record_get_direction", out.record_get_direction);
  library.find("gnutls_record_recv", out.record_recv);
  library.find("gnutls_record_send", out.record_send);
  library.find("gnutls_bye", out.bye);
  library.find("gnutls_x509_crt_init", out.x509_crt_init);
  library.find("gnutls_x509_crt_deinit", out.x509_crt_deinit);
  library.find("gnutls_x509_crt_import", out.x509_crt_import);
  library.find("gnutls_x509_crt_get_dn", out.x509_crt_get_dn);
  return out;
}

}  // namespace

const GnutlsApi& gnutls_api() {
  static base::LoadOnce<GnutlsApi> functions;
  return functions.get(&load);
}

}  // namespace minivmm::nbd
