// SPDX-License-Identifier: Apache-2.0
#include "hostile_server.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>

#include <gtest/gtest.h>

namespace minivmm::nbd {
namespace {

constexpr uint64_t kOptionMagic = 0x49484156454f5054;
constexpr uint32_t kStructured = 8, kSetMeta = 10, kGo = 7;
constexpr uint32_t kInfoReply = 3, kMetaReply = 4;

uint64_t number_at(const Bytes& from, size_t at, size_t size) {
  Reply reply;
  reply.payload = from;
  return reply.number(at, size);
}

}  // namespace

void HostilePeer::send(const Bytes& bytes) {
  size_t sent = 0;
  while (sent < bytes.size()) {
    const ssize_t n = ::send(socket_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) throw Gone();
    sent += static_cast<size_t>(n);
  }
}

Bytes HostilePeer::receive(size_t size) {
  Bytes out(size);
  size_t have = 0;
  while (have < size) {
    const ssize_t n = ::recv(socket_, out.data() + have, size - have, 0);
    if (n <= 0) throw Gone();
    have += static_cast<size_t>(n);
  }
  return out;
}

void HostilePeer::wait_for_end() {
  for (;;) (void)receive(1);
}

void HostilePeer::greet() {
  send(join({text("NBDMAGIC"), be64(kOptionMagic), be16(3)}));
  (void)receive(4);
}

HostilePeer::Option HostilePeer::option() {
  const Bytes head = receive(16);
  EXPECT_EQ(number_at(head, 0, 8), kOptionMagic);
  return {static_cast<uint32_t>(number_at(head, 8, 4)), receive(number_at(head, 12, 4))};
}

void HostilePeer::answer(const Option& to, uint32_t type, const Bytes& data) {
  send(join({be64(0x3e889045565a9), be32(to.id), be32(type),
             be32(static_cast<uint32_t>(data.size())), data}));
}

void HostilePeer::enter(const Terms& terms) {
  greet();
  for (;;) {
    const Option asked = option();
    const bool known = (asked.id == kStructured && terms.structured) ||
                       (asked.id == kSetMeta && terms.structured) || asked.id == kGo;
    if (!known) {
      answer(asked, kErrUnsup);
      continue;
    }
    if (asked.id == kSetMeta && terms.contexts) {
      answer(asked, kMetaReply, join({be32(1), text("base:allocation")}));
    }
    if (asked.id == kGo) {
      answer(asked, kInfoReply, join({be16(0), be64(terms.size), be16(terms.flags)}));
      if (!terms.block_sizes.empty()) {
        answer(asked, kInfoReply, join({be16(3), terms.block_sizes}));
      }
    }
    answer(asked, kAck);
    if (asked.id == kGo) return;
  }
}

HostilePeer::Request HostilePeer::request() {
  const Bytes head = receive(28);
  EXPECT_EQ(number_at(head, 0, 4), 0x25609513u);
  Request out{static_cast<uint16_t>(number_at(head, 4, 2)),
              static_cast<uint16_t>(number_at(head, 6, 2)), number_at(head, 8, 8),
              number_at(head, 16, 8), static_cast<uint32_t>(number_at(head, 24, 4))};
  if (out.type == 1) out.payload = receive(out.length);
  return out;
}

void HostilePeer::simple(const Request& to, uint32_t error, const Bytes& data) {
  send(join({be32(0x67446698), be32(error), be64(to.cookie), data}));
}

void HostilePeer::chunk(const Request& to, uint16_t type, const Bytes& payload, bool done) {
  send(join({be32(0x668e33ef), be16(done ? 1 : 0), be16(type), be64(to.cookie),
             be32(static_cast<uint32_t>(payload.size())), payload}));
}

void HostilePeer::answer_all(uint16_t type, const std::function<void(const Request&)>& answer) {
  for (;;) {
    const Request asked = request();
    if (asked.type == 2) return;
    if (asked.type == type) {
      answer(asked);
    } else {
      simple(asked);
    }
  }
}

void HostilePeer::serve() {
  enter();
  for (;;) {
    const Request asked = request();
    if (asked.type == 0) {
      chunk(asked, 1, join({be64(asked.offset), Bytes(asked.length, std::byte{'x'})}));
    } else if (asked.type == 7) {
      chunk(asked, 5, join({be32(1), be32(asked.length), be32(0)}));
    } else if (asked.type == 2) {
      return;
    } else {
      simple(asked);
    }
  }
}

HostileServer::HostileServer(std::string path, std::function<void(HostilePeer&)> talk)
    : path_(std::move(path)),
      talk_(std::move(talk)),
      listener_(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  path_.copy(address.sun_path, sizeof address.sun_path - 1);
  ::unlink(path_.c_str());
  EXPECT_EQ(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  EXPECT_EQ(::listen(listener_.get(), 16), 0);
  thread_ = std::thread([this] { accept_clients(); });
}

HostileServer::~HostileServer() {
  ::shutdown(listener_.get(), SHUT_RDWR);
  thread_.join();
  for (const int each : sockets_) ::shutdown(each, SHUT_RDWR);
  for (std::thread& each : talks_) each.join();
  for (const int each : sockets_) ::close(each);
  ::unlink(path_.c_str());
}

void HostileServer::accept_clients() {
  for (;;) {
    base::UniqueFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!fd) return;
    const timeval limit{.tv_sec = 10, .tv_usec = 0};
    (void)::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    (void)::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    sockets_.push_back(fd.release());
    talks_.emplace_back([this, socket = sockets_.back(), number = connections_++] {
      HostilePeer peer(socket, number);
      try {
        talk_(peer);
      } catch (const HostilePeer::Gone&) {
      }
      ::shutdown(socket, SHUT_RDWR);
    });
  }
}

}  // namespace minivmm::nbd
