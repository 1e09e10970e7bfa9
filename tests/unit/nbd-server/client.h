// SPDX-License-Identifier: Apache-2.0
// A client that says exactly what a test tells it to, right or wrong. Blocking, with a time limit
// on everything. It has its own idea of the protocol's numbers, so that a mistake of the server's
// is not shared.
#pragma once

#include <string>
#include <string_view>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "base/unique_fd.h"

namespace minivmm::nbd {

using Bytes = std::vector<std::byte>;

Bytes be16(uint16_t v);
Bytes be32(uint32_t v);
Bytes be64(uint64_t v);
Bytes text(std::string_view s);
Bytes join(std::initializer_list<Bytes> parts);

struct OptionAnswer {
  uint32_t option;
  uint32_t type;
  Bytes data;
  std::string text() const { return {reinterpret_cast<const char*>(data.data()), data.size()}; }
};

struct Reply {
  bool structured = false;
  uint16_t flags = 1;  // of the chunk; a simple reply is always done
  uint16_t type = 0;
  uint32_t error = 0;
  uint64_t cookie = 0;
  uint64_t offset = 0;  // of an extended reply
  bool extended = false;
  Bytes payload{};
  uint64_t number(size_t at, size_t size) const;  // big-endian from the payload
};

constexpr uint32_t kAck = 1;
constexpr uint32_t kErrUnsup = 0x80000001;
constexpr uint32_t kErrInvalid = 0x80000003;
constexpr uint32_t kErrUnknown = 0x80000006;
constexpr uint32_t kErrTooBig = 0x80000009;

class Client {
 public:
  explicit Client(base::UniqueFd socket);

  int fd() const noexcept { return socket_.get(); }
  void send(const Bytes& bytes);
  // Fails the test and returns less where the server closes or is silent.
  Bytes receive(size_t size);
  // True if the server closes the connection within the limit and sends nothing before.
  bool closed();
  void close() { socket_.reset(); }

  // Magic numbers and flags, then ours.
  void greet(uint32_t flags = 3);
  void send_option(uint32_t option, const Bytes& data);
  OptionAnswer answer();
  // Sends an option and returns its answers up to the final one.
  std::vector<OptionAnswer> option(uint32_t option, const Bytes& data = {});
  uint32_t final_of(uint32_t option, const Bytes& data = {});
  // Greets, asks for structured replies and base:allocation as told, and enters transmission.
  // Returns the transmission flags.
  uint16_t enter(std::string_view name, bool structured = false, bool contexts = false);

  Bytes request(uint16_t type, uint64_t cookie, uint64_t offset, uint32_t length,
                uint16_t flags = 0);
  // With extended headers.
  Bytes long_request(uint16_t type, uint64_t cookie, uint64_t offset, uint64_t length,
                     uint16_t flags = 0);
  // Greets, asks for extended headers and the contexts, and enters transmission.
  uint16_t enter_extended(std::string_view name, const std::vector<std::string>& contexts = {});
  Reply simple(size_t payload = 0);
  // Of either form; a simple reply where the server sends one.
  Reply chunk();
  // Sends an extended request (with its payload) and returns its only chunk.
  Reply ask(uint16_t type, uint64_t offset, uint64_t length, uint16_t flags = 0,
            const Bytes& payload = {});
  // Sends a request (with its payload) and returns its error code, by either kind of reply.
  uint32_t error_of(uint16_t type, uint64_t offset, uint32_t length, uint16_t flags = 0,
                    const Bytes& payload = {});
  Bytes read(uint64_t offset, uint32_t length);  // without structured replies

 private:
  base::UniqueFd socket_;
  uint64_t cookie_ = 0x1122334455667788;
};

}  // namespace minivmm::nbd
