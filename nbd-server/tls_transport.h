// SPDX-License-Identifier: Apache-2.0
// What GnuTLS reads from and writes to: a non-blocking socket, of which one receive brings many
// records and one send takes many. Part of a TlsSession; used by one thread at a time.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <memory>
#include <vector>

struct gnutls_session_int;

namespace minivmm::nbd {

class TlsTransport {
 public:
  explicit TlsTransport(int socket) noexcept : socket_(socket) {}
  TlsTransport(const TlsTransport&) = delete;
  TlsTransport& operator=(const TlsTransport&) = delete;

  // Makes the session use this. It stays where it is from then on.
  void attach(gnutls_session_int* session) noexcept;

  // The handshake has ended: from here on whatever the session writes is taken, and kept where the
  // socket has no room. (GnuTLS answers some messages by itself, while it receives.)
  void keep() noexcept { keeps_ = true; }
  bool pending() const noexcept { return !out_.empty(); }

  // After keep(). What the session writes gathers from begin() to end(), which sends it. end(): 0
  // when all is out; -EAGAIN where the socket has no room, then flush() goes on; another -errno.
  void begin() noexcept;
  int end() noexcept;
  int flush() noexcept;

  // Something was received that the session has not taken.
  bool has_input() const noexcept { return in_begin_ != in_end_; }
  // Nothing more is there to be received: gives back memory that holds nothing.
  void idle() noexcept {
    if (in_begin_ == in_end_) in_.reset();
  }

 private:
  static constexpr size_t kInput = size_t{32} << 10;
  // A client that makes us answer and does not read is cut off then.
  static constexpr size_t kMostKept = size_t{256} << 10;

  ssize_t pull(std::byte* to, size_t size) noexcept;
  ssize_t push(const std::byte* from, size_t size) noexcept;
  ssize_t send(const std::byte* from, size_t size) noexcept;
  bool append(std::vector<std::byte>& to, const std::byte* from, size_t size) noexcept;

  const int socket_;
  gnutls_session_int* session_ = nullptr;
  bool keeps_ = false;
  bool gathers_ = false;
  std::vector<std::byte> out_;  // what the socket did not take
  std::unique_ptr<std::byte[]> in_;
  size_t in_begin_ = 0;
  size_t in_end_ = 0;
};

}  // namespace minivmm::nbd
