// SPDX-License-Identifier: Apache-2.0
// Bounds on what clients can take from a server: places, time, memory.
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <vector>

#include "fixture.h"
#include "tests/support/process.h"
#include "tests/support/slow.h"

namespace minivmm::nbd {
namespace {

using std::chrono::milliseconds;
constexpr uint16_t kRead = 0;
constexpr uint16_t kWrite = 1;
constexpr uint16_t kFlush = 3;
constexpr uint32_t kGo = 7;
constexpr uint32_t kErrPolicy = 0x80000002;

Bytes go(std::string_view name) {
  return join({be32(static_cast<uint32_t>(name.size())), text(name), be16(0)});
}

class Limits : public ServerTest {
 protected:
  explicit Limits(ServerOptions options = {}) : ServerTest(options) {}
  void add_limited(const std::string& name, const std::string& keys, ExportOptions options) {
    on_fiber([&] {
      (void)graph_.add(block::Options::from_keys(keys + ",node-name=" + name));
      server_->add_export(name,
                          graph_.attach(name, "NBD export", block::Permissions::front_end(false)),
                          std::move(options));
    });
  }
  uint64_t used() {
    for (const std::string& line : server_->describe()) {
      const auto at = line.find("memory: ");
      if (at != line.npos) return std::stoull(line.substr(at + 8));
    }
    return 0;
  }
};

class FewHandshakes : public Limits {
 protected:
  FewHandshakes() : Limits({.max_handshakes = 4}) { add("disk", "driver=memory,size=1M"); }
};

TEST_F(FewHandshakes, TheOldestOfTooManySilentClientsMakesRoom) {
  std::vector<Client> silent;
  for (int i = 0; i < 4; ++i) silent.push_back(connect());
  for (Client& each : silent) each.greet();
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.read(0, 512).size(), 512u);
  EXPECT_TRUE(silent[0].closed());
  // The others are served on, and who is past the handshake does not count.
  silent[1].send(be32(0));
  EXPECT_EQ(silent[2].final_of(kGo, go("disk")), kAck);
}

class Hurried : public ServerTest {
 protected:
  Hurried() : ServerTest({.handshake_limit = milliseconds(1500)}, 1) {
    add("disk", "driver=memory,size=1M");
  }
};

// Its options are there before the server asks for them and its answers are taken at once, so that
// nothing makes the server wait: others get their turn all the same, and the handshake's time ends.
TEST_F(Hurried, AHandshakeWithoutAPauseEndsInTimeAndKeepsNobodyFromTheServer) {
  const auto begin = base::Clock::now();
  Client hog = connect();
  hog.greet();
  Bytes batch;
  for (int n = 0; n < 4000; ++n) {
    const Bytes one = join({be64(0x49484156454f5054), be32(3), be32(0)});
    batch.insert(batch.end(), one.begin(), one.end());
  }
  std::thread says([&] {
    while (::send(hog.fd(), batch.data(), batch.size(), MSG_NOSIGNAL) > 0) {
    }
  });
  std::thread hears([&] {
    std::vector<std::byte> sink(256 << 10);
    while (::recv(hog.fd(), sink.data(), sink.size(), 0) > 0) {
    }
  });
  ::usleep(50'000);
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.read(0, 512).size(), 512u);
  says.join();
  hears.join();
  EXPECT_LT(base::Clock::now() - begin, std::chrono::seconds(5));
}

TEST_F(Limits, AnExportHasSoManyPlaces) {
  add_limited("disk", "driver=memory,size=1M", {.description = {}, .max_connections = 2});
  Client one = connect(), two = connect(), three = connect();
  one.enter("disk");
  two.enter("disk");
  three.greet();
  EXPECT_EQ(three.final_of(kGo, go("disk")), kErrPolicy);
  Client old = connect();
  old.greet();
  old.send_option(1, text("disk"));
  EXPECT_TRUE(old.closed());
  // A place is free when its client has gone.
  one.send(one.request(2, 1, 0, 0));
  EXPECT_TRUE(one.closed());
  uint32_t answer = kErrPolicy;
  for (int i = 0; i < 200 && answer != kAck; ++i) {
    answer = three.final_of(kGo, go("disk"));
    ::usleep(5000);
  }
  EXPECT_EQ(answer, kAck);
}

class Listener : public Limits {
 protected:
  Listener() : path_(testing::TempDir() + "nbd_limits_" + std::to_string(::getpid())) {
    add("disk", "driver=memory,size=1M");
  }
  void listen(ListenOptions options) {
    options.uri = "nbd+unix:///?socket=" + path_;
    on_fiber([&] { (void)server_->listen(std::move(options)); });
  }
  const std::string path_;
};

TEST_F(Listener, OneClientHasOnlySoManyConnections) {
  ListenOptions options;
  options.max_per_client = 2;
  listen(std::move(options));
  Client one = connect_to(path_), two = connect_to(path_);
  one.enter("disk");
  two.enter("disk");
  EXPECT_TRUE(connect_to(path_).closed());
  // Another listener's connections, and those that were handed over, are not counted.
  Client other = connect();
  other.enter("disk");
}

TEST_F(Listener, FurtherClientsWaitWhileItHasSoMany) {
  ListenOptions options;
  options.max_connections = 1;
  listen(std::move(options));
  Client one = connect_to(path_);
  one.enter("disk");
  Client two = connect_to(path_);
  pollfd p{two.fd(), POLLIN, 0};
  EXPECT_EQ(::poll(&p, 1, 100), 0);
  one.close();
  two.enter("disk");
}

TEST_F(Listener, SilenceIsBoundedInTheHandshakeAndAfterIt) {
  ListenOptions options;
  options.handshake_limit = milliseconds(100);
  options.idle_limit = milliseconds(200);
  listen(std::move(options));
  Client mute = connect_to(path_);
  mute.greet();
  Client idle = connect_to(path_);
  idle.enter("disk");
  EXPECT_TRUE(mute.closed());
  EXPECT_TRUE(idle.closed());
}

class Roomy : public Limits {
 protected:
  Roomy() : Limits({.memory = uint64_t{200} << 20}) {}
};

TEST_F(Roomy, TheClientsOfAnExportShareItsMemory) {
  add_limited("small", "driver=null,size=1G", {.description = {}, .memory = 1});
  add("large", "driver=null,size=1G");
  std::vector<Client> hogs;
  for (int i = 0; i < 4; ++i) {
    hogs.push_back(connect());
    hogs.back().enter("small");
    hogs.back().send(hogs.back().request(kRead, 1, 0, 30 << 20));
  }
  // Each in turn gets it, and gives it up unread for the next.
  uint64_t most = 0;
  for (int i = 0; i < 1000 && most < uint64_t{30} << 20; ++i) {
    most = std::max(most, used());
    ::usleep(1000);
  }
  for (int i = 0; i < 100; ++i) {
    most = std::max(most, used());
    ::usleep(1000);
  }
  EXPECT_LE(most, uint64_t{45} << 20);
  EXPECT_GE(most, uint64_t{30} << 20);
  Client other = connect();
  other.enter("large");
  EXPECT_EQ(other.read(0, 32 << 20).size(), 32u << 20);
  // All come, one after the other, whoever was first.
  std::vector<std::thread> readers;
  for (Client& each : hogs) {
    readers.emplace_back([&each] { EXPECT_EQ(each.simple(30 << 20).error, 0u); });
  }
  for (std::thread& each : readers) each.join();
  for (int i = 0; i < 100 && used() != 0; ++i) ::usleep(10'000);
  EXPECT_EQ(used(), 0u);
}

// As many clients as there may be, all of whom ask for much and read nothing: the server's memory
// is bounded, and who reads is served.
TEST_F(Limits, ClientsThatNeverReadCostLittle) {
  rlimit files{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &files), 0);
  files.rlim_cur = std::min<rlim_t>(files.rlim_max, 8192);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &files), 0);
  add("disk", "driver=null,size=1G");
  const size_t count = slow_tests() ? 1000 : 200;
  const uint64_t before = resident_mib();
  std::vector<Client> hogs;
  for (size_t i = 0; i < count; ++i) {
    hogs.push_back(connect());
    Client& hog = hogs.back();
    hog.enter("disk", i % 2 == 0);
    const uint32_t size = i % 3 == 0 ? 4096 : 65536;
    Bytes requests;
    for (uint64_t n = 0; n < 128; ++n) requests = join({requests, hog.request(kRead, n, 0, size)});
    hog.send(requests);
  }
  ::usleep(300'000);
  EXPECT_LE(used(), uint64_t{48} << 20);
  if (kMemoryIsOurs) {
    EXPECT_LE(resident_mib() - before, 64u);
  }
  Client other = connect();
  other.enter("disk");
  for (int i = 0; i < 20; ++i) EXPECT_EQ(other.read(0, 65536).size(), 65536u);
}

// More clients than there is memory for announce large writes and do not send them. Who asks for
// little is not behind them in a queue, which would be as long as the stall limit (5 s) and more.
TEST_F(Limits, SmallRequestsDoNotWaitBehindLargeOnes) {
  add("disk", "driver=null,size=1G");
  std::vector<Client> hogs;
  for (int i = 0; i < 60; ++i) {
    hogs.push_back(connect());
    hogs.back().enter("disk");
    hogs.back().send(hogs.back().request(kWrite, 1, 0, 1 << 20));
  }
  for (int i = 0; i < 500 && used() < uint64_t{42} << 20; ++i) ::usleep(10'000);
  ASSERT_GE(used(), uint64_t{42} << 20);
  Client other = connect();
  other.enter("disk");
  const auto began = base::Clock::now();
  for (int i = 0; i < 20; ++i) EXPECT_EQ(other.read(0, 65536).size(), 65536u);
  EXPECT_EQ(other.error_of(kWrite, 0, 4096, 0, Bytes(4096)), 0u);
  EXPECT_LT(base::Clock::now() - began, std::chrono::seconds(3));
}

// Nobody is cut off here: those who do not read leave room for those who do.
class Patient : public Limits {
 protected:
  Patient() : Limits({.stall_limit = std::chrono::hours(1)}) {}
};

TEST_F(Patient, WhoReadsIsServedWhileOthersDoNot) {
  add("disk", "driver=null,size=1G");
  std::vector<Client> hogs;
  for (int i = 0; i < 16; ++i) {
    hogs.push_back(connect());
    hogs.back().enter("disk");
    Bytes requests;
    for (uint64_t n = 0; n < 64; ++n) {
      requests = join({requests, hogs.back().request(kRead, n, 0, 1 << 20)});
    }
    hogs.back().send(requests);
  }
  ::usleep(100'000);
  Client other = connect();
  other.enter("disk");
  for (int i = 0; i < 10; ++i) EXPECT_EQ(other.read(0, 1 << 20).size(), 1u << 20);
}

// More than there is memory for. They are not cut off for it, and who reads after all gets what he
// asked for: in one piece, or, where replies are structured, with the holes as such.
TEST_F(Patient, RepliesThatNobodyReadsGiveUpTheirMemoryAndComeAllTheSame) {
  constexpr uint32_t kPart = 1 << 20;
  constexpr size_t kParts = 4;
  add("disk", "driver=memory,size=8M");
  Client other = connect();
  other.enter("disk");
  Bytes content(8 << 20);
  for (size_t at = 0; at < content.size(); at += 65536) {
    if (at % kPart == 3 * 65536) continue;  // a hole
    for (size_t i = 0; i < 65536; ++i) content[at + i] = static_cast<std::byte>((at + i) * 7 >> 9);
    const Bytes piece(content.begin() + static_cast<ptrdiff_t>(at),
                      content.begin() + static_cast<ptrdiff_t>(at) + 65536);
    ASSERT_EQ(other.error_of(kWrite, at, 65536, 0, piece), 0u);
  }
  std::vector<Client> hogs;
  for (size_t i = 0; i < 60; ++i) {
    Client& hog = hogs.emplace_back(connect());
    hog.enter("disk", i % 2 == 1);
    // Replies of all kinds: one to be read again has others before and behind it.
    Bytes said = hog.request(kRead, 100, uint64_t{1} << 40, 512);
    for (size_t n = 0; n < kParts; ++n) {
      said = join({said, hog.request(kRead, n, (i + n) % 8 * kPart, kPart)});
    }
    hog.send(join({said, hog.request(kFlush, 101, 0, 0)}));
  }
  // All come to hold memory in their turn, and all give it up.
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(other.read(3 << 20, kPart),
              Bytes(content.begin() + (3 << 20), content.begin() + (4 << 20)));
  }
  const auto answer = [](Client& hog, bool structured) {
    std::pair<uint64_t, Bytes> out;
    for (bool done = false; !done;) {
      const Reply reply = structured ? hog.chunk() : hog.simple(0);
      out.first = reply.cookie;
      done = (reply.flags & 1) != 0;
      if (reply.type == 1) {
        out.second.insert(out.second.end(), reply.payload.begin() + 8, reply.payload.end());
      } else if (reply.type == 2) {
        out.second.resize(out.second.size() + reply.number(8, 4));
      } else if (!structured && reply.error == 0 && reply.cookie < kParts) {
        out.second = hog.receive(kPart);
      }
    }
    return out;
  };
  for (size_t i = 0; i < hogs.size(); ++i) {
    size_t seen = 0;
    for (size_t n = 0; n < kParts + 2; ++n) {
      const auto [cookie, data] = answer(hogs[i], i % 2 == 1);
      if (cookie >= kParts) continue;
      const auto at = static_cast<ptrdiff_t>((i + cookie) % 8 * kPart);
      EXPECT_TRUE(data == Bytes(content.begin() + at, content.begin() + at + kPart)) << i;
      ++seen;
    }
    ASSERT_EQ(seen, kParts) << i;
  }
  for (int i = 0; i < 100 && used() != 0; ++i) ::usleep(10'000);
  EXPECT_EQ(used(), 0u);
}

// Waiting for an answer is not silence.
TEST_F(Listener, AClientWithARequestInFlightIsNotIdle) {
  add("slow", "driver=fault,op=read,errno=none,delay-ns=700000000,file.driver=memory,file.size=1M");
  ListenOptions options;
  options.idle_limit = milliseconds(200);
  listen(std::move(options));
  Client client = connect_to(path_);
  client.enter("slow");
  EXPECT_EQ(client.read(0, 512).size(), 512u);
  // And from then on it is.
  EXPECT_TRUE(client.closed());
}

TEST_F(Limits, ConnectingAndLeavingLeaksNothing) {
  add("disk", "driver=memory,size=1M");
  const auto come_and_go = [&](int times) {
    for (int i = 0; i < times; ++i) {
      Client client = connect();
      if (i % 4 == 0) continue;
      client.enter("disk", i % 4 == 1, i % 4 == 1);
      if (i % 4 == 2) client.send(client.request(kRead, 1, 0, 65536));
      if (i % 4 == 3) client.send(Bytes(20));
    }
    const auto busy = [&] {
      for (const std::string& line : server_->describe()) {
        if (line.starts_with("NBD client")) return true;
      }
      return false;
    };
    for (int i = 0; i < 1000 && busy(); ++i) ::usleep(5000);
    EXPECT_FALSE(busy());
  };
  come_and_go(500);
  const uint64_t memory = resident_mib();
  const size_t files = descriptors();
  come_and_go(slow_tests() ? 10'000 : 2000);
  EXPECT_EQ(descriptors(), files);
  if (kMemoryIsOurs) {
    EXPECT_LE(resident_mib(), memory + 2);
  }
  EXPECT_EQ(used(), 0u);
}

// A client that chooses an export and does not read the answer uses it, as far as anybody can tell:
// it is let go when the export is withdrawn, and not waited for.
TEST_F(Limits, AWithdrawnExportIsNotHeldByAHandshakeThatIsNotRead) {
  add("disk", "driver=memory,size=1M");
  const Bytes name = join({be32(4), text("disk"), be16(0)});
  constexpr uint32_t kInfo = 6;
  const auto option = [&](uint32_t which) {
    return join({text("IHAVEOPT"), be32(which), be32(static_cast<uint32_t>(name.size())), name});
  };
  const Bytes asked = option(kInfo);
  // At once: a socket counts pieces, too.
  const auto send_many = [&](Client& to, int count) {
    Bytes all;
    for (int i = 0; i < count; ++i) all.insert(all.end(), asked.begin(), asked.end());
    to.send(all);
  };
  const auto queued = [](const Client& client) {
    int bytes = 0;
    EXPECT_EQ(::ioctl(client.fd(), FIONREAD, &bytes), 0);
    return bytes;
  };
  Client probe = connect();
  probe.greet();
  const int before = queued(probe);
  probe.send(asked);
  const auto limit = soon();
  while (queued(probe) == before && base::Clock::now() < limit) ::usleep(1000);
  ::usleep(20'000);
  const int answer = queued(probe) - before;
  ASSERT_GT(answer, 0);
  // How many answers the socket takes.
  Client full = connect();
  full.greet();
  int last = -1;
  for (int same = 0; same < 3;) {
    const int now = queued(full);
    same = now == last ? same + 1 : 0;
    last = now;
    if (same == 0) send_many(full, 300);
    ::usleep(30'000);
  }
  const int fits = last / answer;
  Client client = connect();
  client.greet();
  send_many(client, fits);
  client.send(option(kGo));
  const auto begin = base::Clock::now();
  while (queued(client) < fits * answer && base::Clock::now() < begin + std::chrono::seconds(10)) {
    ::usleep(1000);
  }
  ::usleep(20'000);
  EXPECT_EQ(queued(client), fits * answer) << "the answer to GO has been sent, too";
  EXPECT_EQ(error_number([&] {
              on_fiber([&] {
                server_->remove_export("disk", base::Clock::now() + std::chrono::seconds(3));
              });
            }),
            0);
}

}  // namespace
}  // namespace minivmm::nbd
