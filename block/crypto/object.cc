// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/object.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/crypto/secret.h"
#include "block/crypto/tls_object.h"

namespace minivmm::block::crypto {

ObjectText parse_object(std::string_view text) {
  ObjectText out;
  if (text.starts_with('{')) {
    out.options = Options::from_json(text);
    out.type = out.options.require_string("qom-type");
    return out;
  }
  // The type stands first, with or without its key.
  const size_t comma = std::min(text.find(','), text.size());
  out.type = text.substr(0, comma);
  constexpr std::string_view kKey = "qom-type=";
  if (out.type.starts_with(kKey)) out.type.erase(0, kKey.size());
  if (comma < text.size()) out.options = Options::from_keys(text.substr(comma + 1));
  return out;
}

void add_object(std::string_view text) {
  ObjectText object = parse_object(text);
  if (object.type == "secret") return secrets().add(std::move(object.options));
  if (object.type == "tls-creds-x509") {
    return tls_objects().add(TlsObject::Kind::kX509, std::move(object.options));
  }
  if (object.type == "tls-creds-psk") {
    return tls_objects().add(TlsObject::Kind::kPsk, std::move(object.options));
  }
  if (object.type == "authz-simple") return tls_objects().add_identity(std::move(object.options));
  throw base::Error(ENOTSUP, fmt::format("objects of type '{}' are not supported; there are: "
                                         "secret, tls-creds-x509, tls-creds-psk, authz-simple",
                                         object.type));
}

}  // namespace minivmm::block::crypto
