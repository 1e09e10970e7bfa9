// SPDX-License-Identifier: Apache-2.0
// The binding to GnuTLS, whose ciphers and hashes the rest of this folder is made of. The library
// is loaded when it is first needed, not linked: who has no encrypted disk does not need it.
//
// Its handles belong to one thread at a time; its functions may be called from any.
#pragma once

#include <string>
#include <string_view>

#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>

namespace minivmm::block::crypto {

struct Gnutls {
  decltype(&::gnutls_strerror) strerror;
  decltype(&::gnutls_rnd) rnd;
  decltype(&::gnutls_pbkdf2) pbkdf2;
  decltype(&::gnutls_hash_fast) hash_fast;
  decltype(&::gnutls_hash_init) hash_init;
  decltype(&::gnutls_hash) hash;
  decltype(&::gnutls_hash_output) hash_output;
  decltype(&::gnutls_hash_deinit) hash_deinit;
  decltype(&::gnutls_cipher_init) cipher_init;
  decltype(&::gnutls_cipher_set_iv) cipher_set_iv;
  decltype(&::gnutls_cipher_encrypt2) cipher_encrypt2;
  decltype(&::gnutls_cipher_decrypt2) cipher_decrypt2;
  decltype(&::gnutls_cipher_deinit) cipher_deinit;
};

// Loads the library at the first call, which reads files and wants a thread's stack: not on a
// fiber. Throws ENOTSUP saying what to install; the next call tries again. Any thread.
const Gnutls& gnutls();

// Throws EIO with GnuTLS's text if `status` is an error. `what`: "AES-256-CBC key".
void require_success(int status, std::string_view what);

}  // namespace minivmm::block::crypto
