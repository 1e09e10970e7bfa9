// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/uri.h"

#include <cerrno>
#include <charconv>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::nbd {
namespace {

[[noreturn]] void reject(std::string_view text, std::string_view why) {
  throw base::Error(EINVAL, fmt::format("'{}' is not an NBD address: {}; give nbd://HOST[:PORT] or "
                                        "nbd+unix:///?socket=PATH",
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

// "HOST", "HOST:PORT", "[V6]", "[V6]:PORT", or empty.
void parse_authority(std::string_view uri, std::string_view authority, Uri& out) {
  if (authority.find('@') != authority.npos) reject(uri, "user names are not supported");
  std::string_view port;
  if (authority.starts_with('[')) {
    const size_t end = authority.find(']');
    if (end == authority.npos) reject(uri, "'[' without ']'");
    out.host = decode(uri, authority.substr(1, end - 1));
    port = authority.substr(end + 1);
    if (!port.empty() && port.front() != ':') reject(uri, "text after ']'");
  } else {
    const size_t colon = authority.find(':');
    if (colon != authority.npos && authority.find(':', colon + 1) != authority.npos) {
      reject(uri, "an IPv6 address needs brackets");
    }
    out.host = decode(uri, authority.substr(0, colon));
    if (colon != authority.npos) port = authority.substr(colon);
  }
  if (port.empty()) return;
  port.remove_prefix(1);
  const auto [end, err] = std::from_chars(port.data(), port.data() + port.size(), out.port);
  if (err != std::errc() || end != port.data() + port.size()) reject(uri, "a bad port");
}

}  // namespace

std::string Uri::text() const {
  if (is_unix()) {
    return fmt::format("nbd+unix:///{}?socket={}", encode(export_name, "/"),
                       encode(socket_path, "/"));
  }
  const bool v6 = host.find(':') != host.npos;
  std::string out = v6 ? fmt::format("nbd://[{}]", encode(host, ":")) : "nbd://" + encode(host, "");
  if (port != kDefaultPort) out += fmt::format(":{}", port);
  if (!export_name.empty()) out += "/" + encode(export_name, "/");
  return out;
}

Uri parse_uri(std::string_view text) {
  constexpr std::string_view kTcp = "nbd://";
  constexpr std::string_view kUnix = "nbd+unix://";
  const bool is_unix = text.starts_with(kUnix);
  if (!is_unix && !text.starts_with(kTcp)) reject(text, "no scheme that is known");
  std::string_view rest = text.substr(is_unix ? kUnix.size() : kTcp.size());

  Uri out;
  if (rest.find('#') != rest.npos) reject(text, "fragments are not supported");
  std::string_view query;
  if (const size_t mark = rest.find('?'); mark != rest.npos) {
    query = rest.substr(mark + 1);
    rest = rest.substr(0, mark);
  }
  const size_t slash = rest.find('/');
  const std::string_view authority = rest.substr(0, slash);
  if (slash != rest.npos) out.export_name = decode(text, rest.substr(slash + 1));

  if (!is_unix) {
    if (!query.empty()) reject(text, "unknown parameters after '?'");
    parse_authority(text, authority, out);
    return out;
  }
  if (!authority.empty()) reject(text, "a host makes no sense for a unix socket");
  constexpr std::string_view kSocket = "socket=";
  if (!query.starts_with(kSocket)) reject(text, "'?socket=PATH' is missing");
  query.remove_prefix(kSocket.size());
  if (query.find('&') != query.npos) reject(text, "unknown parameters after the socket");
  out.socket_path = decode(text, query);
  if (out.socket_path.empty()) reject(text, "the socket's path is empty");
  return out;
}

}  // namespace minivmm::nbd
