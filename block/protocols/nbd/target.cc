// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/nbd/target.h"

#include <cerrno>

#include "base/error.h"
#include "block/crypto/tls_object.h"

namespace minivmm::block {
namespace {

using base::Error;
using base::NbdUri;

constexpr uint64_t kMaxSeconds = 86'400;
constexpr uint64_t kMaxConnections = 16;

std::chrono::seconds take_seconds(Options& options, const char* key) {
  return std::chrono::seconds(options.take_uint(key, 0, 0, kMaxSeconds));
}

// "server.path" in QEMU's present form, "path" in its older one.
NbdUri take_address(Options& options, const std::string& prefix) {
  NbdUri out;
  const auto take = [&](const char* key) { return options.take_string(prefix + key); };
  const std::string type = prefix.empty() ? "" : options.require_string(prefix + "type");
  const auto path = take("path");
  const auto host = take("host");
  if (type == "vsock") {
    out.vsock_cid = static_cast<uint32_t>(options.take_uint(prefix + "cid", 2, 0, UINT32_MAX));
    out.vsock_port =
        static_cast<uint32_t>(options.take_uint(prefix + "port", base::kNbdPort, 0, UINT32_MAX));
    return out;
  }
  if (!type.empty() && type != "unix" && type != "inet") {
    throw Error(EINVAL, "option 'server.type': unix, inet or vsock is expected");
  }
  if (path.has_value() == host.has_value() || (type == "unix") != (path && !type.empty())) {
    throw Error(EINVAL,
                "an NBD disk needs uri=, or server.type=unix and server.path=, or "
                "server.type=inet, server.host= and server.port=");
  }
  if (path) {
    if (path->empty()) throw Error(EINVAL, "option 'path': the socket's path is empty");
    out.socket_path = *path;
    return out;
  }
  out.host = *host;
  out.port =
      static_cast<uint16_t>(options.take_uint(prefix + "port", base::kNbdPort, 1, UINT16_MAX));
  return out;
}

void take_tls(Options& options, NbdUri& uri) {
  if (const auto id = options.take_string("tls-creds")) {
    crypto::use_tls_object(crypto::tls_objects().get(*id, false), uri);
  }
  if (auto name = options.take_string("tls-hostname")) {
    if (!uri.tls) throw Error(EINVAL, "option 'tls-hostname' needs tls-creds= or a nbds URI");
    uri.tls_hostname = std::move(*name);
  }
}

}  // namespace

NbdTarget take_nbd_target(Options& options) {
  NbdTarget out;
  if (const auto uri = options.take_string("uri")) {
    out.uri = base::parse_nbd_uri(*uri);
  } else {
    const bool older = options.has("path") || options.has("host");
    out.uri = take_address(options, older ? "" : "server.");
  }
  if (auto name = options.take_string("export")) {
    if (!out.uri.export_name.empty() && *name != out.uri.export_name) {
      throw Error(EINVAL, "option 'export': the URI names another export");
    }
    out.uri.export_name = std::move(*name);
  }
  if (out.uri.host.empty() && !out.uri.is_unix() && !out.uri.is_vsock()) out.uri.host = "localhost";
  take_tls(options, out.uri);
  out.reconnect_delay = take_seconds(options, "reconnect-delay");
  out.open_timeout = take_seconds(options, "open-timeout");
  out.request_timeout = take_seconds(options, "request-timeout");
  if (out.request_timeout.count() != 0) out.closing_timeout = out.request_timeout;
  out.connections = static_cast<unsigned>(options.take_uint("connections", 0, 0, kMaxConnections));
  return out;
}

}  // namespace minivmm::block
