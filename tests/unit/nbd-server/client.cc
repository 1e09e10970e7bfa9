// SPDX-License-Identifier: Apache-2.0
#include "client.h"

#include <sys/socket.h>
#include <sys/time.h>

#include <cerrno>
#include <cstring>

#include <gtest/gtest.h>

namespace minivmm::nbd {
namespace {

template <typename T>
Bytes big_endian(T v) {
  Bytes out(sizeof v);
  for (size_t i = 0; i < sizeof v; ++i) {
    out[i] = static_cast<std::byte>(v >> (8 * (sizeof v - 1 - i)));
  }
  return out;
}

uint64_t number_at(const Bytes& bytes, size_t at, size_t size) {
  uint64_t out = 0;
  for (size_t i = 0; i < size && at + i < bytes.size(); ++i) {
    out = out << 8 | std::to_integer<uint64_t>(bytes[at + i]);
  }
  return out;
}

}  // namespace

Bytes be16(uint16_t v) { return big_endian(v); }
Bytes be32(uint32_t v) { return big_endian(v); }
Bytes be64(uint64_t v) { return big_endian(v); }
Bytes text(std::string_view s) {
  const auto* const p = reinterpret_cast<const std::byte*>(s.data());
  return {p, p + s.size()};
}
Bytes join(std::initializer_list<Bytes> parts) {
  Bytes out;
  for (const Bytes& part : parts) out.insert(out.end(), part.begin(), part.end());
  return out;
}

uint64_t Reply::number(size_t at, size_t size) const { return number_at(payload, at, size); }

Client::Client(base::UniqueFd socket) : socket_(std::move(socket)) {
  const timeval limit{20, 0};
  ::setsockopt(fd(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  ::setsockopt(fd(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

void Client::send(const Bytes& bytes) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t n = ::send(fd(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n < 0) return;  // the server has closed: what is received next tells
    sent += static_cast<size_t>(n);
  }
}

Bytes Client::receive(size_t size) {
  Bytes out(size);
  size_t have = 0;
  while (have < size) {
    const ssize_t n = ::recv(fd(), out.data() + have, size - have, 0);
    if (n <= 0) {
      ADD_FAILURE() << "received " << have << " of " << size
                    << " bytes: " << (n == 0 ? "closed" : std::strerror(errno));
      out.resize(have);
      break;
    }
    have += static_cast<size_t>(n);
  }
  return out;
}

bool Client::closed() {
  std::byte byte;
  const ssize_t n = ::recv(fd(), &byte, 1, 0);
  return n == 0 || (n < 0 && errno == ECONNRESET);
}

void Client::greet(uint32_t flags) {
  const Bytes hello = receive(18);
  EXPECT_EQ(number_at(hello, 0, 8), 0x4e42444d41474943u);
  EXPECT_EQ(number_at(hello, 8, 8), 0x49484156454f5054u);
  EXPECT_EQ(number_at(hello, 16, 2), 3u);
  send(be32(flags));
}

void Client::send_option(uint32_t option, const Bytes& data) {
  send(join(
      {be64(0x49484156454f5054), be32(option), be32(static_cast<uint32_t>(data.size())), data}));
}

OptionAnswer Client::answer() {
  const Bytes header = receive(20);
  EXPECT_EQ(number_at(header, 0, 8), 0x0003e889045565a9u);
  OptionAnswer out{static_cast<uint32_t>(number_at(header, 8, 4)),
                   static_cast<uint32_t>(number_at(header, 12, 4)),
                   {}};
  out.data = receive(number_at(header, 16, 4));
  return out;
}

std::vector<OptionAnswer> Client::option(uint32_t option, const Bytes& data) {
  send_option(option, data);
  std::vector<OptionAnswer> out;
  do {
    out.push_back(answer());
    EXPECT_EQ(out.back().option, option);
  } while (out.back().type > kAck && out.back().type < 0x80000000 && !testing::Test::HasFailure());
  return out;
}

uint32_t Client::final_of(uint32_t opt, const Bytes& data) { return option(opt, data).back().type; }

uint16_t Client::enter(std::string_view name, bool structured, bool contexts) {
  greet();
  const Bytes named = join({be32(static_cast<uint32_t>(name.size())), text(name)});
  if (structured) {
    EXPECT_EQ(final_of(8), kAck);
  }
  if (contexts) {
    const std::string_view context = "base:allocation";
    const auto answers = option(
        10, join({named, be32(1), be32(static_cast<uint32_t>(context.size())), text(context)}));
    EXPECT_EQ(answers.size(), 2u);
  }
  const auto answers = option(7, join({named, be16(0)}));
  EXPECT_EQ(answers.back().type, kAck);
  for (const OptionAnswer& each : answers) {
    if (each.type == 3 && number_at(each.data, 0, 2) == 0) {
      return static_cast<uint16_t>(number_at(each.data, 10, 2));
    }
  }
  ADD_FAILURE() << "no information about the export";
  return 0;
}

Bytes Client::request(uint16_t type, uint64_t cookie, uint64_t offset, uint32_t length,
                      uint16_t flags) {
  return join(
      {be32(0x25609513), be16(flags), be16(type), be64(cookie), be64(offset), be32(length)});
}

Bytes Client::long_request(uint16_t type, uint64_t cookie, uint64_t offset, uint64_t length,
                           uint16_t flags) {
  return join(
      {be32(0x21e41c71), be16(flags), be16(type), be64(cookie), be64(offset), be64(length)});
}

uint16_t Client::enter_extended(std::string_view name, const std::vector<std::string>& contexts) {
  greet();
  EXPECT_EQ(final_of(11), kAck);
  const Bytes named = join({be32(static_cast<uint32_t>(name.size())), text(name)});
  if (!contexts.empty()) {
    Bytes data = join({named, be32(static_cast<uint32_t>(contexts.size()))});
    for (const std::string& each : contexts) {
      data = join({data, be32(static_cast<uint32_t>(each.size())), text(each)});
    }
    EXPECT_EQ(option(10, data).size(), contexts.size() + 1);
  }
  const auto answers = option(7, join({named, be16(0)}));
  EXPECT_EQ(answers.back().type, kAck);
  return static_cast<uint16_t>(number_at(answers.front().data, 10, 2));
}

Reply Client::simple(size_t payload) {
  const Bytes header = receive(16);
  EXPECT_EQ(number_at(header, 0, 4), 0x67446698u);
  Reply out;
  out.error = static_cast<uint32_t>(number_at(header, 4, 4));
  out.cookie = number_at(header, 8, 8);
  if (out.error == 0) out.payload = receive(payload);
  return out;
}

Reply Client::chunk() {
  Bytes header = receive(16);
  Reply out;
  out.structured = true;
  if (number_at(header, 0, 4) == 0x67446698u) {
    out.structured = false;
    out.error = static_cast<uint32_t>(number_at(header, 4, 4));
    out.cookie = number_at(header, 8, 8);
    return out;
  }
  out.extended = number_at(header, 0, 4) == 0x6e8a278cu;
  if (!out.extended) {
    EXPECT_EQ(number_at(header, 0, 4), 0x668e33efu);
  }
  out.flags = static_cast<uint16_t>(number_at(header, 4, 2));
  out.type = static_cast<uint16_t>(number_at(header, 6, 2));
  out.cookie = number_at(header, 8, 8);
  if (out.extended) out.offset = number_at(receive(8), 0, 8);
  const size_t width = out.extended ? 8 : 4;
  out.payload = receive(number_at(receive(width), 0, width));
  if (out.type >= 0x8000) out.error = static_cast<uint32_t>(out.number(0, 4));
  return out;
}

uint32_t Client::error_of(uint16_t type, uint64_t offset, uint32_t length, uint16_t flags,
                          const Bytes& payload) {
  const uint64_t cookie = ++cookie_;
  send(join({request(type, cookie, offset, length, flags), payload}));
  const Reply reply = chunk();
  EXPECT_EQ(reply.cookie, cookie);
  EXPECT_EQ(reply.flags & 1, 1);
  return reply.error;
}

Reply Client::ask(uint16_t type, uint64_t offset, uint64_t length, uint16_t flags,
                  const Bytes& payload) {
  const uint64_t cookie = ++cookie_;
  send(join({long_request(type, cookie, offset, length, flags), payload}));
  const Reply reply = chunk();
  EXPECT_TRUE(reply.extended);
  EXPECT_EQ(reply.cookie, cookie);
  EXPECT_EQ(reply.offset, offset);
  EXPECT_EQ(reply.flags & 1, 1);
  return reply;
}

Bytes Client::read(uint64_t offset, uint32_t length) {
  send(request(0, ++cookie_, offset, length));
  const Reply reply = simple(length);
  EXPECT_EQ(reply.error, 0u);
  EXPECT_EQ(reply.cookie, cookie_);
  return reply.payload;
}

}  // namespace minivmm::nbd
