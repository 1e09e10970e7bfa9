// SPDX-License-Identifier: Apache-2.0
// STARTTLS, right and wrong, and what goes through it: the client is the node `nbd`.
#include <string>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <thread>
#include <vector>

#include "fixture.h"

namespace minivmm::nbd {
namespace {

constexpr uint32_t kAbort = 2, kList = 3, kStartTls = 5, kInfo = 6, kGo = 7, kStructured = 8,
                   kListMeta = 9, kSetMeta = 10;
constexpr uint32_t kErrTlsReqd = 0x80000005;

Bytes named(std::string_view name) {
  return join({be32(static_cast<uint32_t>(name.size())), text(name)});
}

// What a listener that wants TLS says to those who do not begin it.
class TlsHandshake : public ServerTest {
 protected:
  TlsHandshake() : path_(testing::TempDir() + "nbd_tls_" + std::to_string(::getpid())) {
    std::filesystem::create_directory(path_ + ".d");
    std::ofstream(path_ + ".d/keys.psk") << "alice:" << std::string(64, 'a') << "\n";
    add("disk", "driver=memory,size=1M");
  }
  ~TlsHandshake() override { std::filesystem::remove_all(path_ + ".d"); }

  void listen(TlsOptions::Mode mode) {
    ListenOptions options;
    options.uri = "nbd+unix:///?socket=" + path_;
    options.tls.mode = mode;
    options.tls.kind = TlsOptions::Kind::kPsk;
    options.tls.directory = path_ + ".d";
    const std::string address = on_fiber([&] { return server_->listen(std::move(options)); });
    EXPECT_EQ(address.starts_with("nbds+unix://"), mode == TlsOptions::Mode::kRequired) << address;
  }
  const std::string path_;
};

TEST_F(TlsHandshake, NothingElseIsAnsweredWhereItIsRequired) {
  listen(TlsOptions::Mode::kRequired);
  Client client = connect_to(path_);
  client.greet();
  for (const uint32_t option : {kList, kGo, kInfo, kStructured, kListMeta, kSetMeta, 99u}) {
    EXPECT_EQ(client.final_of(option, Bytes(10)), kErrTlsReqd) << option;
  }
  EXPECT_EQ(client.final_of(kStartTls, text("x")), kErrInvalid);
  EXPECT_EQ(client.final_of(kAbort), kAck);
  EXPECT_TRUE(client.closed());
  Client second = connect_to(path_);
  second.greet();
  second.send_option(1, text("disk"));  // EXPORT_NAME has no error
  EXPECT_TRUE(second.closed());
}

TEST_F(TlsHandshake, NobodyHasToWhereItIsOptional) {
  listen(TlsOptions::Mode::kOptional);
  Client client = connect_to(path_);
  client.enter("disk");
  EXPECT_EQ(client.read(0, 512), Bytes(512));
}

// For a client that does not speak fixed newstyle there is no TLS, and it is not asked for any.
TEST_F(TlsHandshake, WhoCannotBeginItIsNotToldTo) {
  on_fiber([&] {
    (void)graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=hers"));
    server_->add_export("hers",
                        graph_.attach("hers", "NBD export", block::Permissions::front_end(false)),
                        {.description = "", .writable = false, .allow = {"alice"}});
  });
  constexpr uint32_t kErrPolicy = 0x80000002;
  listen(TlsOptions::Mode::kOptional);
  Client client = connect_to(path_);
  client.greet(2);
  EXPECT_EQ(client.final_of(kStartTls), kErrPolicy);
  EXPECT_EQ(client.final_of(kGo, join({named("hers"), be16(0)})), kErrPolicy);
  EXPECT_EQ(client.final_of(kGo, join({named("disk"), be16(0)})), kAck);
  EXPECT_EQ(client.read(0, 512), Bytes(512));
  ListenOptions required;
  required.uri = "nbd+unix:///?socket=" + path_ + ".2";
  required.tls = {.mode = TlsOptions::Mode::kRequired,
                  .kind = TlsOptions::Kind::kPsk,
                  .directory = path_ + ".d"};
  on_fiber([&] { (void)server_->listen(std::move(required)); });
  Client second = connect_to(path_ + ".2");
  second.greet(0);
  for (const uint32_t option : {kList, kGo, kInfo, kStructured, kListMeta, kSetMeta, kStartTls}) {
    EXPECT_EQ(second.final_of(option, option == kStartTls ? Bytes() : Bytes(10)), kErrPolicy)
        << option;
  }
  second.send_option(1, text("disk"));
  EXPECT_TRUE(second.closed());
}

// After the acknowledgement there is TLS or nothing, and others are served on.
TEST_F(TlsHandshake, WhatIsNotTlsEndsTheSession) {
  listen(TlsOptions::Mode::kRequired);
  for (const Bytes& said : {Bytes(64), text("GET / HTTP/1.0\r\n\r\n"), Bytes{}}) {
    Client client = connect_to(path_);
    client.greet();
    EXPECT_EQ(client.final_of(kStartTls), kAck);
    client.send(said);
    ::shutdown(client.fd(), SHUT_WR);
    std::byte sink[256];
    while (::recv(client.fd(), sink, sizeof sink, 0) > 0) {
    }
    EXPECT_TRUE(client.closed());
  }
}

// Who need not use TLS has none.
TEST_F(TlsHandshake, OptionalTlsIsNoneBeyondLoopback) {
  const auto everywhere = [&](TlsOptions::Mode mode) {
    ListenOptions options;
    options.uri = "nbd://0.0.0.0:0";
    options.tls = {.mode = mode, .kind = TlsOptions::Kind::kPsk, .directory = path_ + ".d"};
    return error_number([&] { on_fiber([&] { (void)server_->listen(std::move(options)); }); });
  };
  EXPECT_EQ(everywhere(TlsOptions::Mode::kOptional), EACCES);
  EXPECT_EQ(everywhere(TlsOptions::Mode::kRequired), 0);
}

TEST_F(TlsHandshake, KeysThatAreNotThereAreNamed) {
  std::filesystem::remove(path_ + ".d/keys.psk");
  EXPECT_EQ(error_number([&] { listen(TlsOptions::Mode::kRequired); }), ENOENT);
}

TEST_F(TlsHandshake, ExportsForOthersAreNotSeen) {
  on_fiber([&] {
    const auto node = graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=hers"));
    server_->add_export("hers",
                        graph_.attach("hers", "NBD export", block::Permissions::front_end(false)),
                        {.description = "", .writable = false, .allow = {"alice"}});
  });
  listen(TlsOptions::Mode::kOptional);
  Client client = connect_to(path_);
  client.greet();
  EXPECT_EQ(client.option(kList).size(), 2u);  // disk, and the end
  EXPECT_EQ(client.final_of(kGo, join({named("hers"), be16(0)})), kErrTlsReqd);
  EXPECT_EQ(client.final_of(kInfo, join({named("hers"), be16(0)})), kErrTlsReqd);
  client.option(kStructured);
  // The protocol has that answer for those two only.
  EXPECT_EQ(client.final_of(kListMeta, join({named("hers"), be32(0)})), 0x80000002u);
  Client plain = connect();
  plain.greet();
  EXPECT_EQ(plain.final_of(kGo, join({named("hers"), be16(0)})), 0x80000002u);
  plain.send_option(1, text("hers"));
  EXPECT_TRUE(plain.closed());
}

// Large and small, both ways at once: records that the socket takes only in part, several in one
// receive, and one in several.
TEST_F(TlsHandshake, MuchDataGoesBothWaysAtOnce) {
  listen(TlsOptions::Mode::kRequired);
  block::Handle remote = on_fiber([&] {
    (void)graph_.add(block::Options::from_keys(
        "driver=nbd,node-name=remote,connections=1,uri=nbds+unix://alice@/disk?socket=" + path_ +
        "&tls-psk-file=" + path_ + ".d/keys.psk"));
    return graph_.attach("remote", "the test", block::Permissions::front_end(true));
  });
  constexpr unsigned kUsers = 4;
  constexpr size_t kPart = (1 << 20) / kUsers;
  const auto use = [&](unsigned user) {
    std::mt19937_64 random(user);
    Bytes model(kPart);
    for (int i = 0; i < 12; ++i) {
      const size_t size = i % 3 == 0 ? kPart : 1 + random() % 40'000;
      const size_t at = random() % (kPart - size + 1);
      for (size_t j = at; j < at + size; ++j) model[j] = static_cast<std::byte>(random());
      remote.write(user * kPart + at, base::SingleBuffer(model.data() + at, size));
      Bytes seen(kPart);
      remote.read(user * kPart, base::SingleBuffer(seen.data(), kPart));
      EXPECT_TRUE(seen == model) << "user " << user << ", turn " << i;
    }
  };
  std::vector<std::thread> users;
  for (unsigned i = 0; i < kUsers; ++i) {
    users.emplace_back([&, i] { loops_.loop(i % loops_.size()).call("user", [&] { use(i); }); });
  }
  for (std::thread& each : users) each.join();
  on_fiber([&] {
    remote.close();
    graph_.remove("remote");
  });
}

}  // namespace
}  // namespace minivmm::nbd
