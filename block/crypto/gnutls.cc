// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/gnutls.h"

#include <atomic>
#include <cerrno>
#include <mutex>

#include <dlfcn.h>
#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::block::crypto {
namespace {

using base::Error;

constexpr const char* kLibrary = "libgnutls.so.30";

class Library {
 public:
  Library() : handle_(::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) {
      throw Error(ENOTSUP, fmt::format("encryption needs the library {}: install the package "
                                       "libgnutls30 ({})",
                                       kLibrary, ::dlerror()));
    }
  }
  template <typename Function>
  void find(const char* name, Function& out) const {
    void* address = ::dlsym(handle_, name);
    if (address == nullptr) {
      throw Error(ENOTSUP, fmt::format("{} has no function {}: encryption needs GnuTLS 3.7 or "
                                       "later",
                                       kLibrary, name));
    }
    // SAFETY: POSIX has object and function pointers convertible; the type is the header's.
    out = reinterpret_cast<Function>(address);
  }

 private:
  void* const handle_;  // never closed: it registers handlers that outlive any use
};

Gnutls load() {
  const Library library;
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
  static std::mutex loading;
  static Gnutls functions;  // written once, before `loaded`
  static std::atomic<bool> loaded{false};
  if (!loaded.load(std::memory_order_acquire)) [[unlikely]] {
    const std::lock_guard lock(loading);
    if (!loaded.load(std::memory_order_relaxed)) {
      functions = load();
      loaded.store(true, std::memory_order_release);
    }
  }
  return functions;
}

void require_success(int status, std::string_view what) {
  if (status >= 0) return;
  throw Error(EIO, fmt::format("{}: {}", what, gnutls().strerror(status)));
}

}  // namespace minivmm::block::crypto
