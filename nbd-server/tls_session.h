// SPDX-License-Identifier: Apache-2.0
// One connection's TLS, at the end that its credentials are for, over its non-blocking socket. A
// server's is owned by the connection's stream, on its loop, but for what says that it wants a
// thread's stack.
#pragma once

#include <string>
#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <span>

#include "nbd-server/tls.h"
#include "nbd-server/tls_transport.h"

namespace minivmm::nbd {

class TlsSession {
 public:
  // In a pool. The socket outlives it.
  TlsSession(std::shared_ptr<const TlsCredentials> credentials, int socket);
  ~TlsSession();
  TlsSession(const TlsSession&) = delete;
  TlsSession& operator=(const TlsSession&) = delete;

  enum class Step { kDone, kWantsRead, kWantsWrite };
  // In a pool, until it is done. Throws EACCES with what went wrong; the peer has been told.
  Step handshake();
  // A server's, in a pool, after it: the certificate's distinguished name ("O=Example,CN=alice", in
  // its own order), or the key's user.
  std::string peer_name() const;

  // As Stream's. What was given to a send that returned -EAGAIN has to be given again, at the
  // front.
  int64_t try_receive(std::span<const iovec> to) noexcept;
  int64_t try_send(std::span<const iovec> from) noexcept;
  // Says that nothing more comes, without waiting for room.
  void bye() noexcept;
  // What GnuTLS says of the -EPROTO or the end that was received, if it does.
  std::string trouble() const;

 private:
  void choose_credentials();
  void check_client();
  void check_server();
  std::string why(int status) const;
  int64_t encrypt(std::span<const iovec> from) noexcept;

  const std::shared_ptr<const TlsCredentials> credentials_;
  TlsTransport transport_;
  struct Closer {
    void operator()(gnutls_session_int* session) const noexcept;
  };
  std::unique_ptr<gnutls_session_int, Closer> session_;
  // Bytes of data whose records the socket did not take whole.
  size_t stuck_ = 0;
  int trouble_ = 0;  // GnuTLS's
};

}  // namespace minivmm::nbd
