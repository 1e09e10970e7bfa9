// SPDX-License-Identifier: Apache-2.0
#include "base/nbd_uri.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::base {
namespace {

[[noreturn]] void reject(std::string_view text, std::string_view why) {
  throw Error(EINVAL, fmt::format("'{}' is not an NBD address: {}; give nbd://HOST[:PORT], "
                                  "nbd+unix:///?socket=PATH or nbd+vsock://CID[:PORT]",
                                  text, why));
}

int hex_digit(char c) noexcept {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::string decode(std::string_view uri, std::string_view part) {
  std::string out;
  for (size_t i = 0; i < part.size(); ++i) {
    if (part[i] != '%') {
      out += part[i];
      continue;
    }
    if (part.size() - i < 3 || hex_digit(part[i + 1]) < 0 || hex_digit(part[i + 2]) < 0) {
      reject(uri, "a '%' without two hexadecimal digits");
    }
    const int value = hex_digit(part[i + 1]) * 16 + hex_digit(part[i + 2]);
    if (value == 0) reject(uri, "%00");
    out += static_cast<char>(value);
    i += 2;
  }
  return out;
}

std::string encode(std::string_view text, std::string_view also_plain) {
  std::string out;
  for (const char c : text) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                       std::string_view("-._~").find(c) != std::string_view::npos ||
                       also_plain.find(c) != std::string_view::npos;
    if (plain) {
      out += c;
    } else {
      out += fmt::format("%{:02X}", static_cast<unsigned char>(c));
    }
  }
  return out;
}

template <typename T>
T number(std::string_view uri, std::string_view text, const char* what) {
  T out = 0;
  const auto [end, err] = std::from_chars(text.data(), text.data() + text.size(), out);
  if (err != std::errc() || end != text.data() + text.size()) {
    reject(uri, fmt::format("a bad {}", what));
  }
  return out;
}

// "HOST", "HOST:PORT", "[V6]", "[V6]:PORT", or empty; the port as it stands, with its colon.
struct Authority {
  std::string_view host;
  std::string_view port;
  bool bracketed = false;
};

Authority split_authority(std::string_view uri, std::string_view text) {
  Authority out;
  if (text.starts_with('[')) {
    const size_t end = text.find(']');
    if (end == text.npos) reject(uri, "'[' without ']'");
    out = {text.substr(1, end - 1), text.substr(end + 1), true};
    if (!out.port.empty() && out.port.front() != ':') reject(uri, "text after ']'");
    return out;
  }
  const size_t colon = text.find(':');
  if (colon != text.npos && text.find(':', colon + 1) != text.npos) {
    reject(uri, "an IPv6 address needs brackets");
  }
  out.host = text.substr(0, colon);
  if (colon != text.npos) out.port = text.substr(colon);
  return out;
}

enum class Transport { kTcp, kUnix, kVsock };
struct Scheme {
  std::string_view prefix;
  Transport transport;
  bool tls;
};
constexpr Scheme kSchemes[] = {
    {"nbd://", Transport::kTcp, false},         {"nbds://", Transport::kTcp, true},
    {"nbd+unix://", Transport::kUnix, false},   {"nbds+unix://", Transport::kUnix, true},
    {"nbd+vsock://", Transport::kVsock, false}, {"nbds+vsock://", Transport::kVsock, true},
};

const Scheme* scheme_of(std::string_view text) noexcept {
  for (const Scheme& each : kSchemes) {
    if (text.starts_with(each.prefix)) return &each;
  }
  return nullptr;
}

void parse_authority(std::string_view uri, std::string_view text, Transport transport,
                     NbdUri& out) {
  if (const size_t at = text.find('@'); at != text.npos) {
    if (!out.tls) reject(uri, "a user name goes with TLS: nbds");
    out.user = decode(uri, text.substr(0, at));
    text = text.substr(at + 1);
  }
  if (transport == Transport::kUnix) {
    if (!text.empty()) reject(uri, "a host makes no sense for a unix socket");
    return;
  }
  const Authority parts = split_authority(uri, text);
  const std::string_view port = parts.port.empty() ? parts.port : parts.port.substr(1);
  if (transport == Transport::kVsock) {
    out.vsock_cid = number<uint32_t>(uri, parts.host, "vsock address");
    if (!parts.port.empty()) out.vsock_port = number<uint32_t>(uri, port, "port");
    return;
  }
  out.host = decode(uri, parts.host);
  if (!parts.port.empty()) out.port = number<uint16_t>(uri, port, "port");
}

void parse_query(std::string_view uri, std::string_view query, Transport transport, NbdUri& out) {
  while (!query.empty()) {
    const std::string_view item = query.substr(0, query.find('&'));
    query.remove_prefix(std::min(item.size() + 1, query.size()));
    const size_t equals = item.find('=');
    const std::string_view key = item.substr(0, equals);
    std::string* to = nullptr;
    if (key == "socket" && transport == Transport::kUnix) to = &out.socket_path;
    if (key == "tls-certificates" && out.tls) to = &out.certificates;
    if (key == "tls-psk-file" && out.tls) to = &out.psk_file;
    if (key == "tls-hostname" && out.tls) to = &out.tls_hostname;
    if (item == "tls-verify-peer=true" && out.tls) continue;
    if (item == "tls-verify-peer=false" && out.tls) {
      out.verify_peer = false;
      continue;
    }
    if (to == nullptr || equals == item.npos) {
      reject(uri, fmt::format("unknown parameter '{}'", item));
    }
    *to = decode(uri, item.substr(equals + 1));
  }
  if (transport == Transport::kUnix && out.socket_path.empty()) {
    reject(uri, "'?socket=PATH' is missing");
  }
}

}  // namespace

std::string NbdUri::text() const {
  const std::string scheme = tls ? "nbds" : "nbd";
  const std::string who = user.empty() ? "" : encode(user, "") + "@";
  std::string out;
  std::string separator = "?";
  const auto add = [&](const char* key, const std::string& value) {
    if (value.empty()) return;
    out += fmt::format("{}{}={}", std::exchange(separator, "&"), key, encode(value, "/"));
  };
  if (is_unix()) {
    out = fmt::format("{}+unix://{}/{}", scheme, who, encode(export_name, "/"));
    add("socket", socket_path);
  } else {
    if (is_vsock()) {
      out = fmt::format("{}+vsock://{}{}", scheme, who, *vsock_cid);
      if (vsock_port != kNbdPort) out += fmt::format(":{}", vsock_port);
    } else {
      const bool v6 = host.find(':') != host.npos;
      out = fmt::format("{}://{}", scheme, who);
      out += v6 ? fmt::format("[{}]", encode(host, ":")) : encode(host, "");
      if (port != kNbdPort) out += fmt::format(":{}", port);
    }
    if (!export_name.empty()) out += "/" + encode(export_name, "/");
  }
  add("tls-certificates", certificates);
  add("tls-psk-file", psk_file);
  add("tls-hostname", tls_hostname);
  if (!verify_peer) add("tls-verify-peer", "false");
  return out;
}

bool is_nbd_uri(std::string_view text) noexcept { return scheme_of(text) != nullptr; }

NbdUri parse_nbd_uri(std::string_view text) {
  const Scheme* const scheme = scheme_of(text);
  if (scheme == nullptr) reject(text, "no scheme that is known");
  std::string_view rest = text.substr(scheme->prefix.size());
  if (rest.find('#') != rest.npos) reject(text, "fragments are not supported");
  std::string_view query;
  if (const size_t mark = rest.find('?'); mark != rest.npos) {
    query = rest.substr(mark + 1);
    rest = rest.substr(0, mark);
  }
  NbdUri out;
  out.tls = scheme->tls;
  const size_t slash = rest.find('/');
  if (slash != rest.npos) out.export_name = decode(text, rest.substr(slash + 1));
  parse_authority(text, rest.substr(0, slash), scheme->transport, out);
  parse_query(text, query, scheme->transport, out);
  return out;
}

}  // namespace minivmm::base
