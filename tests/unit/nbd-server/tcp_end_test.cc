// SPDX-License-Identifier: Apache-2.0
// The end of a session over TCP: the kernel throws away what has not gone out yet where a socket is
// closed in which something unread lies, or to which something is sent then.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <unistd.h>

#include <future>

#include "base/nbd_uri.h"
#include "fixture.h"

namespace minivmm::nbd {
namespace {

constexpr uint16_t kRead = 0, kDisc = 2, kFlush = 3;
constexpr uint32_t kSize = 256 << 10;

class TcpEnd : public ServerTest {
 protected:
  TcpEnd() {
    add("disk", "driver=memory,size=1M");
    const std::string uri =
        on_fiber([&] { return server_->listen({.uri = "nbd://127.0.0.1:0", .fd = {}}); });
    port_ = base::parse_nbd_uri(uri).port;
  }
  // With a small window: what is sent to it stays where it comes from for long.
  Client enter_by_tcp() {
    base::UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const int small = 4096;
    EXPECT_EQ(::setsockopt(fd.get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small), 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port_);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    Client out(std::move(fd));
    out.enter("disk");
    return out;
  }
  uint16_t port_ = 0;
};

TEST_F(TcpEnd, WhatWasAnsweredComesThoughTheClientGoesOnAsking) {
  Client client = enter_by_tcp();
  client.send(client.request(kRead, 1, 0, kSize));
  ::usleep(50'000);  // answered, as far as the server is concerned
  auto ended = std::async(std::launch::async, [this] {
    return error_number([&] { on_fiber([&] { server_->remove_export("disk", soon()); }); });
  });
  ::usleep(50'000);
  client.send(client.request(kFlush, 2, 0, 0));
  ::usleep(50'000);
  const Reply reply = client.simple(kSize);
  EXPECT_EQ(reply.cookie, 1u);
  EXPECT_EQ(reply.payload.size(), kSize);
  EXPECT_TRUE(client.closed());
  EXPECT_EQ(ended.get(), 0);
}

TEST_F(TcpEnd, WhatComesBehindALeaveTakingCostsNoAnswer) {
  Client client = enter_by_tcp();
  client.send(join({client.request(kRead, 1, 0, kSize), client.request(kDisc, 2, 0, 0),
                    client.request(kFlush, 3, 0, 0)}));
  ::usleep(50'000);
  client.send(client.request(kFlush, 4, 0, 0));
  ::usleep(50'000);
  EXPECT_EQ(client.simple(kSize).payload.size(), kSize);
  EXPECT_TRUE(client.closed());
}

// One that takes nothing is not waited for for long, and not at all where it is cut off.
TEST_F(TcpEnd, AClientThatTakesNothingIsLetGo) {
  Client client = enter_by_tcp();
  client.send(client.request(kRead, 1, 0, kSize));
  ::usleep(50'000);
  const auto begin = base::Clock::now();
  on_fiber([&] { server_->remove_export("disk", begin + std::chrono::milliseconds(100)); });
  EXPECT_LT(base::Clock::now() - begin, std::chrono::milliseconds(1500));
}

}  // namespace
}  // namespace minivmm::nbd
