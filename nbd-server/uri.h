// SPDX-License-Identifier: Apache-2.0
// NBD URIs, read and printed: nbd://HOST[:PORT][/NAME] and nbd+unix:///[NAME]?socket=PATH. Pure.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>

namespace minivmm::nbd {

inline constexpr uint16_t kDefaultPort = 10809;

struct Uri {
  // Set for nbd+unix; otherwise host (without brackets, empty: not given) and port.
  std::string socket_path;
  std::string host;
  uint16_t port = kDefaultPort;
  std::string export_name;

  bool is_unix() const noexcept { return !socket_path.empty(); }
  // Ready to paste; what needs it is percent-encoded.
  std::string text() const;
};

// Throws base::Error(EINVAL) naming the text and what is wrong with it.
Uri parse_uri(std::string_view text);

}  // namespace minivmm::nbd
