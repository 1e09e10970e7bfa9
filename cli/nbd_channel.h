// SPDX-License-Identifier: Apache-2.0
// What a handshake with an NBD server goes through: its socket, and TLS over it from some moment
// on. Blocking, with a limit to each wait. One thread.
#pragma once

#include <string>

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>

#include "base/nbd_uri.h"
#include "nbd-server/tls_session.h"

namespace minivmm::cli {

// Reads the files that the address names. Throws naming them.
std::shared_ptr<const nbd::TlsCredentials> nbd_credentials(const base::NbdUri& uri);

class NbdChannel {
 public:
  // `peer` is how errors name the server. The socket outlives this.
  NbdChannel(int socket, std::string peer, std::chrono::seconds limit);

  // All of it. Throw Error that names the server.
  void receive(std::span<std::byte> to);
  void send(std::span<const std::byte> from);

  // From here on everything goes through TLS. Throws what is wrong with the server, or what it
  // says is wrong with us.
  void start_tls(std::shared_ptr<const nbd::TlsCredentials> credentials);
  bool has_tls() const noexcept { return tls_ != nullptr; }
  // The session, which is not this object's any more; null without TLS.
  std::unique_ptr<nbd::TlsSession> take_tls() noexcept { return std::move(tls_); }

  [[noreturn]] void fail(int err, const std::string& why) const;

 private:
  void wait(short events, const char* what) const;
  int64_t receive_some(std::span<std::byte> to);
  int64_t send_some(std::span<const std::byte> from);

  const int socket_;
  const std::string peer_;
  const std::chrono::seconds limit_;
  std::unique_ptr<nbd::TlsSession> tls_;
};

}  // namespace minivmm::cli
