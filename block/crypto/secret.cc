// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/secret.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <span>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/unique_fd.h"
#include "block/crypto/base64.h"
#include "block/crypto/cipher_engine.h"
#include "block/crypto/object.h"
#include "block/crypto/utf8.h"

namespace minivmm::block::crypto {
namespace {

using base::Error;

SecureBytes bytes_of(std::string_view text) {
  return SecureBytes(std::as_bytes(std::span(text.data(), text.size())));
}
std::string_view text_of(const SecureBytes& bytes) {
  // SAFETY: octets as characters.
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

SecureBytes read_file(const std::string& path) {
  const base::UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY));
  if (!fd) throw base::errno_error(errno, fmt::format("secret: cannot read '{}'", path));
  SecureBytes all(kMaxSecretBytes + 1);
  size_t length = 0;
  while (length < all.size()) {
    const ssize_t got = ::read(fd.get(), all.data() + length, all.size() - length);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw base::errno_error(errno, fmt::format("secret: cannot read '{}'", path));
    if (got == 0) return SecureBytes(std::span<const std::byte>(all.span()).first(length));
    length += static_cast<size_t>(got);
  }
  throw Error(EFBIG, fmt::format("secret: '{}' has more than {} bytes", path, kMaxSecretBytes));
}

SecureBytes require_base64(std::string_view text, const std::string& what) {
  auto out = decode_base64(text);
  if (!out) throw Error(EINVAL, fmt::format("{} is not base64", what));
  return std::move(*out);
}

// What is behind the padding: its last byte says how long that is.
SecureBytes without_padding(const SecureBytes& plain) {
  const auto wrong = [] {
    return Error(EINVAL,
                 "Incorrect number of padding bytes: was the secret encrypted with another "
                 "key?");
  };
  if (plain.empty() || plain.size() % kAesBlock != 0) throw wrong();
  const auto padding = std::to_integer<size_t>(plain.data()[plain.size() - 1]);
  if (padding == 0 || padding > kAesBlock) throw wrong();
  return SecureBytes(plain.span().first(plain.size() - padding));
}

SecureBytes decrypt(const SecretStore& store, const std::string& key_id,
                    const std::optional<std::string>& iv_text, SecureBytes encrypted) {
  if (!iv_text) throw Error(EINVAL, "IV is required to decrypt secret: give 'iv' with 'keyid'");
  const SecureBytes iv_bytes = require_base64(*iv_text, "'iv'");
  const SecureBytes key = store.get(key_id);
  Iv iv;
  if (iv_bytes.size() != iv.size() || key.size() != 32 || encrypted.size() % kAesBlock != 0) {
    throw Error(EINVAL, fmt::format("secret: AES-256-CBC needs a key of 32 bytes (there are {}), "
                                    "an IV of 16 ({}) and whole blocks of 16 ({} bytes)",
                                    key.size(), iv_bytes.size(), encrypted.size()));
  }
  std::memcpy(iv.data(), iv_bytes.data(), iv.size());
  if (!encrypted.empty())
    CipherHandle(aes_cbc_of(key.size()), key.span()).decrypt(iv, encrypted.span());
  return without_padding(encrypted);
}

SecureBytes take_value(const SecretStore& store, Options& options) {
  const auto data = options.take_string("data");
  const auto file = options.take_string("file");
  const bool base64 = options.take_choice("format", {"raw", "base64"}, 0) == 1;
  const auto key_id = options.take_string("keyid");
  const auto iv = options.take_string("iv");
  if (data && file) throw Error(EINVAL, "'file' and 'data' are mutually exclusive");
  if (!data && !file) throw Error(EINVAL, "Either 'file' or 'data' must be provided");
  if (data && data->size() > kMaxSecretBytes) throw Error(EFBIG, "secret: 'data' is too long");
  SecureBytes value = data ? bytes_of(*data) : read_file(*file);
  if (key_id) {
    return decrypt(store, *key_id, iv,
                   base64 ? require_base64(text_of(value), "secret data") : std::move(value));
  }
  return base64 ? require_base64(text_of(value), "secret data") : std::move(value);
}

}  // namespace

void SecretStore::add_object(std::string_view text) {
  auto [type, options] = parse_object(text);
  if (type != "secret") {
    throw Error(ENOTSUP,
                fmt::format("objects of type '{}' are not supported; there is: secret", type));
  }
  add(std::move(options));
}

void SecretStore::add(Options options) {
  const std::string id = options.take_string("id").value_or("");
  if (id.empty()) throw Error(EINVAL, "Parameter 'id' is missing");
  try {
    // NOLINTNEXTLINE(clang-analyzer-cplusplus.NewDeleteLeaks): it is moved into the store below
    SecureBytes value = take_value(*this, options);
    options.finish("secret");
    add(id, std::move(value));
  } catch (Error& e) {
    e.prepend(fmt::format("secret '{}'", id));
    throw;
  }
}

void SecretStore::add(const std::string& id, SecureBytes value) {
  const std::lock_guard lock(mutex_);
  if (!secrets_.try_emplace(id, std::move(value)).second) {
    throw Error(EEXIST, fmt::format("there is a secret with id '{}' already", id));
  }
}

SecureBytes SecretStore::get(const std::string& id) const {
  const std::lock_guard lock(mutex_);
  const auto found = secrets_.find(id);
  if (found == secrets_.end()) {
    throw Error(ENOENT, fmt::format("No secret with id '{}': give --object secret,id={},file=PATH",
                                    id, id));
  }
  return SecureBytes(std::as_const(found->second).span());
}

SecureBytes SecretStore::get_text(const std::string& id) const {
  SecureBytes password = get(id);
  if (!is_utf8(password.span())) {
    throw Error(EINVAL, fmt::format("Data from secret {} is not valid UTF-8: QEMU could not open "
                                    "the image with it",
                                    id));
  }
  return password;
}

bool SecretStore::has(const std::string& id) const {
  const std::lock_guard lock(mutex_);
  return secrets_.contains(id);
}

void SecretStore::remove(const std::string& id) {
  const std::lock_guard lock(mutex_);
  secrets_.erase(id);
}

SecretStore& secrets() {
  static SecretStore store;
  return store;
}

}  // namespace minivmm::block::crypto
