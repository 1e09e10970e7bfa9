// SPDX-License-Identifier: Apache-2.0
// NBD URIs, read and printed:
//   nbd://HOST[:PORT][/NAME]   nbd+unix:///[NAME]?socket=PATH   nbd+vsock://CID[:PORT][/NAME]
// and with TLS nbds://, nbds+unix:// and nbds+vsock://, which take USER@ for a pre-shared key and
// the parameters tls-certificates=DIR, tls-psk-file=PATH, tls-hostname=NAME and
// tls-verify-peer=true|false. Pure.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <optional>

namespace minivmm::base {

inline constexpr uint16_t kNbdPort = 10809;

struct NbdUri {
  bool tls = false;
  // One of: a unix socket's path; a vsock address; otherwise host (without brackets, empty: not
  // given) and port.
  std::string socket_path;
  std::optional<uint32_t> vsock_cid;
  uint32_t vsock_port = kNbdPort;
  std::string host;
  uint16_t port = kNbdPort;
  std::string export_name;
  // With TLS only.
  std::string user;
  std::string certificates;
  std::string psk_file;
  std::string tls_hostname;  // that the server's certificate has to have; empty: the host's
  bool verify_peer = true;

  bool is_unix() const noexcept { return !socket_path.empty(); }
  bool is_vsock() const noexcept { return vsock_cid.has_value(); }
  // Ready to paste; what needs it is percent-encoded.
  std::string text() const;
};

// True where the text begins as one of these: then it is no file's name.
bool is_nbd_uri(std::string_view text) noexcept;

// Throws Error(EINVAL) naming the text and what is wrong with it.
NbdUri parse_nbd_uri(std::string_view text);

}  // namespace minivmm::base
