// SPDX-License-Identifier: Apache-2.0
// A client's socket: tries that never wait, and waits on the loop. Owned by the connection. All on
// the connection's loop, but shutdown(), which any thread may call while the Stream lives.
#pragma once

#include <string>
#include <sys/uio.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "base/cancel.h"
#include "base/timer_queue.h"
#include "base/unique_fd.h"
#include "nbd-server/tls_session.h"

namespace minivmm::nbd {

class Stream {
 public:
  explicit Stream(base::UniqueFd socket) noexcept;

  // Fiber. From here on everything goes through TLS, of which we are the server. Throws where the
  // handshake fails; false: too slow, or cancelled.
  bool start_tls(std::shared_ptr<const TlsCredentials> credentials, base::CancelSource& cancel,
                 base::Clock::time_point deadline);
  // Null without TLS.
  const TlsSession* tls() const noexcept { return tls_.get(); }

  // Bytes, 0 at the end of the stream, -EAGAIN where it would wait, or another -errno.
  int64_t try_receive(std::span<iovec> to) noexcept;
  // Bytes, -EAGAIN or another -errno: what was not taken has to be given again. Never raises
  // SIGPIPE.
  int64_t try_send(std::span<iovec> from) noexcept;

  enum class Wait { kReady, kTimeout, kCancelled };
  // Fiber. A broken socket is ready: the next try says what is wrong with it.
  Wait wait_readable(base::CancelSource* cancel,
                     std::optional<base::Clock::time_point> deadline = {});
  Wait wait_writable(base::CancelSource* cancel,
                     std::optional<base::Clock::time_point> deadline = {});

  // Fiber: all of `to` or `from`, by the deadline. False: the client left, was too slow, or the
  // wait was cancelled.
  bool receive_all(std::span<std::byte> to, base::CancelSource& cancel,
                   base::Clock::time_point deadline);
  bool send_all(std::span<const std::byte> from, base::CancelSource& cancel,
                base::Clock::time_point deadline);

  // Tells the client that nothing more comes, if it has a way to.
  void bye() noexcept;
  // Fiber. Sends no more, and waits for a TCP client's host to confirm what was sent, until the
  // deadline: where something unread lies when a socket is closed, and a client that does not know
  // of the end yet sees to that, the kernel throws away what has not gone out.
  void linger(base::Clock::time_point deadline);
  // Ends both directions: whoever waits is woken and finds the socket broken.
  void shutdown() noexcept;

  // "unix socket, process 4711", "[::1]:52011".
  std::string peer() const;
  // Whose it is: address.h's peer_key.
  std::string peer_key() const;

 private:
  Wait wait(uint32_t events, base::CancelSource* cancel,
            std::optional<base::Clock::time_point> deadline);

  base::UniqueFd socket_;
  std::unique_ptr<TlsSession> tls_;
};

}  // namespace minivmm::nbd
