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
  // The socket's buffer has room for more than a little.
  bool has_room() const noexcept;

  // One turn of receiving, from its construction to its end: what one receive brings lies in a
  // buffer of the thread's, and what the session has not taken by the end is kept.
  class Receiving {
   public:
    explicit Receiving(TlsTransport& transport) noexcept : transport_(transport) {}
    ~Receiving();
    // A receive brings no more than so many bytes of data with their records, so that little is
    // kept.
    void want(size_t bytes) noexcept { transport_.wanted_ = bytes; }
    Receiving(const Receiving&) = delete;
    Receiving& operator=(const Receiving&) = delete;

   private:
    TlsTransport& transport_;
  };

  // Something was received that the session has not taken, or the socket may have more.
  bool has_input() const noexcept { return in_begin_ != in_end_ || more_; }

 private:
  static constexpr size_t kInput = size_t{32} << 10;
  // The most data of one record, and what may be around it.
  static constexpr size_t kRecord = size_t{16} << 10;
  static constexpr size_t kRecordOverhead = 64;
  // A client that makes us answer and does not read is cut off then.
  static constexpr size_t kMostKept = size_t{256} << 10;

  ssize_t pull(std::byte* to, size_t size) noexcept;
  ssize_t receive() noexcept;
  ssize_t push(const std::byte* from, size_t size) noexcept;
  ssize_t send(const std::byte* from, size_t size) noexcept;
  bool append(std::vector<std::byte>& to, const std::byte* from, size_t size) noexcept;

  const int socket_;
  gnutls_session_int* session_ = nullptr;
  bool keeps_ = false;
  bool gathers_ = false;
  std::vector<std::byte> out_;  // what the socket did not take
  // What was received and not taken: here between turns, in the thread's buffer within one.
  std::unique_ptr<std::byte[]> in_;
  std::byte* in_begin_ = nullptr;
  std::byte* in_end_ = nullptr;
  size_t wanted_ = 0;    // see Receiving; 0 outside
  bool more_ = false;    // the last receive brought all that it could
  bool broken_ = false;  // what was received could not be kept
};

}  // namespace minivmm::nbd
