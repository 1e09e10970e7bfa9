// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/gnutls.h"

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "base/shared_library.h"

namespace minivmm::block::crypto {
namespace {

using base::Error;

Gnutls load() {
  const base::SharedLibrary library("libgnutls.so.30", "encryption needs GnuTLS 3.7 or later",
                                    "libgnutls30");
  Gnutls out{};
  library.find("gnutls_strerror", out.strerror);
  library.find("gnutls_rnd", out.rnd);
  library.find("gnutls_pbkdf2", out.pbkdf2);
  library.find("gnutls_hash_fast", out.hash_fast);
  library.find("gnutls_hash_init", out.hash_init);
  library.find("gnutls_hash", out.hash);
  library.find("gnutls_hash_output", out.hash_output);
  library.find("gnutls_hash_deinit", out.hash_deinit);
  library.find("gnutls_cipher_init", out.cipher_init);
  library.find("gnutls_cipher_set_iv", out.cipher_set_iv);
  library.find("gnutls_cipher_encrypt2", out.cipher_encrypt2);
  library.find("gnutls_cipher_decrypt2", out.cipher_decrypt2);
  library.find("gnutls_cipher_deinit", out.cipher_deinit);
  return out;
}

}  // namespace

const Gnutls& gnutls() {
  static base::LoadOnce<Gnutls> functions;
  return functions.get(&load);
}

void require_success(int status, std::string_view what) {
  if (status >= 0) return;
  throw Error(EIO, fmt::format("{}: {}", what, gnutls().strerror(status)));
}

}  // namespace minivmm::block::crypto
