// SPDX-License-Identifier: Apache-2.0
// The binding to GnuTLS's TLS sessions, loaded when credentials are first made, not linked.
#pragma once

#include <gnutls/gnutls.h>
#include <gnutls/x509.h>

namespace minivmm::nbd {

struct GnutlsApi {
  decltype(&::gnutls_strerror) strerror;
  decltype(&::gnutls_certificate_allocate_credentials) certificate_allocate_credentials;
  decltype(&::gnutls_certificate_free_credentials) certificate_free_credentials;
  decltype(&::gnutls_certificate_set_x509_trust_file) certificate_set_x509_trust_file;
  decltype(&::gnutls_certificate_set_x509_system_trust) certificate_set_x509_system_trust;
  decltype(&::gnutls_certificate_set_x509_crl_file) certificate_set_x509_crl_file;
  decltype(&::gnutls_certificate_set_x509_key_file) certificate_set_x509_key_file;
  decltype(&::gnutls_certificate_server_set_request) certificate_server_set_request;
  decltype(&::gnutls_certificate_get_peers) certificate_get_peers;
  decltype(&::gnutls_psk_allocate_server_credentials) psk_allocate_server_credentials;
  decltype(&::gnutls_psk_free_server_credentials) psk_free_server_credentials;
  decltype(&::gnutls_psk_set_server_credentials_file) psk_set_server_credentials_file;
  decltype(&::gnutls_psk_server_get_username) psk_server_get_username;
  decltype(&::gnutls_psk_allocate_client_credentials) psk_allocate_client_credentials;
  decltype(&::gnutls_psk_free_client_credentials) psk_free_client_credentials;
  decltype(&::gnutls_psk_set_client_credentials) psk_set_client_credentials;
  decltype(&::gnutls_priority_init) priority_init;
  decltype(&::gnutls_priority_deinit) priority_deinit;
  decltype(&::gnutls_priority_set) priority_set;
  decltype(&::gnutls_init) init;
  decltype(&::gnutls_deinit) deinit;
  decltype(&::gnutls_credentials_set) credentials_set;
  decltype(&::gnutls_session_set_verify_cert) session_set_verify_cert;
  decltype(&::gnutls_server_name_set) server_name_set;
  decltype(&::gnutls_transport_set_ptr) transport_set_ptr;
  decltype(&::gnutls_transport_set_pull_function) transport_set_pull_function;
  decltype(&::gnutls_transport_set_push_function) transport_set_push_function;
  decltype(&::gnutls_transport_set_errno) transport_set_errno;
  decltype(&::gnutls_handshake) handshake;
  decltype(&::gnutls_alert_get) alert_get;
  decltype(&::gnutls_alert_get_name) alert_get_name;
  decltype(&::gnutls_alert_send_appropriate) alert_send_appropriate;
  decltype(&::gnutls_session_get_verify_cert_status) session_get_verify_cert_status;
  decltype(&::gnutls_certificate_verification_status_print) certificate_verification_status_print;
  decltype(&::gnutls_free) free;  // a variable: of a function
  decltype(&::gnutls_record_get_direction) record_get_direction;
  decltype(&::gnutls_record_recv) record_recv;
  decltype(&::gnutls_record_send) record_send;
  decltype(&::gnutls_bye) bye;
  decltype(&::gnutls_x509_crt_init) x509_crt_init;
  decltype(&::gnutls_x509_crt_deinit) x509_crt_deinit;
  decltype(&::gnutls_x509_crt_import) x509_crt_import;
  decltype(&::gnutls_x509_crt_get_dn) x509_crt_get_dn;
};

// Loads the library at the first call: not on a fiber. Throws ENOTSUP saying what to install.
const GnutlsApi& gnutls_api();

}  // namespace minivmm::nbd
