// SPDX-License-Identifier: Apache-2.0
#include "block/crypto/tls_object.h"

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::block::crypto {

using base::Error;

void TlsObjects::add(TlsObject::Kind kind, Options options) {
  const std::string id = options.require_string("id");
  TlsObject out;
  out.kind = kind;
  out.server = options.take_choice("endpoint", {"client", "server"}, 0) == 1;
  out.directory = options.require_string("dir");
  if (out.server) out.priority = options.take_string("priority").value_or("");
  if (options.has("priority")) {
    throw Error(ENOTSUP, fmt::format("TLS credentials '{}': priority= is for endpoint=server; as a "
                                     "client libnbd chooses",
                                     id));
  }
  if (kind == TlsObject::Kind::kX509) {
    out.verify_peer = options.take_bool("verify-peer", true);
  } else {
    out.username = options.take_string("username").value_or(out.username);
  }
  options.finish("TLS credentials '" + id + "'");
  const std::lock_guard lock(mutex_);
  if (!objects_.try_emplace(id, std::move(out)).second) {
    throw Error(EEXIST, fmt::format("there are TLS credentials '{}' already", id));
  }
}

TlsObject TlsObjects::get(const std::string& id, bool server) const {
  const std::lock_guard lock(mutex_);
  const auto found = objects_.find(id);
  if (found == objects_.end()) {
    throw Error(ENOENT, fmt::format("No TLS credentials with id '{0}': give --object "
                                    "tls-creds-x509,id={0},... or tls-creds-psk,id={0},...",
                                    id));
  }
  if (found->second.server != server) {
    throw Error(EINVAL, fmt::format("TLS credentials '{}' are for the other end: endpoint={} is "
                                    "needed here",
                                    id, server ? "server" : "client"));
  }
  return found->second;
}

void TlsObjects::add_identity(Options options) {
  const std::string id = options.require_string("id");
  std::string name = options.require_string("identity");
  options.finish("authorization '" + id + "'");
  const std::lock_guard lock(mutex_);
  if (!identities_.try_emplace(id, std::move(name)).second) {
    throw Error(EEXIST, fmt::format("there is an authorization '{}' already", id));
  }
}

std::string TlsObjects::identity(const std::string& id) const {
  const std::lock_guard lock(mutex_);
  const auto found = identities_.find(id);
  if (found != identities_.end()) return found->second;
  throw Error(ENOENT, fmt::format("No authorization with id '{0}': give --object "
                                  "authz-simple,id={0},identity=NAME",
                                  id));
}

void use_tls_object(const TlsObject& object, base::NbdUri& uri) {
  uri.tls = true;
  uri.verify_peer = object.verify_peer;
  if (object.kind == TlsObject::Kind::kX509) {
    uri.certificates = object.directory;
  } else {
    uri.psk_file = object.directory + "/keys.psk";
    uri.user = object.username;
  }
}

TlsObjects& tls_objects() {
  static TlsObjects objects;
  return objects;
}

}  // namespace minivmm::block::crypto
