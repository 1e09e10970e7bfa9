// SPDX-License-Identifier: Apache-2.0
// What the node `nbd` tells its server so that a flush keeps its promise: seen by a server that
// writes down every request.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <vector>

#include <fmt/core.h>

#include "base/fiber.h"
#include "block/graph/root.h"
#include "fixture.h"
#include "hostile_server.h"

namespace minivmm::nbd {
namespace {

using Peer = HostilePeer;
using Seen = std::vector<std::string>;
constexpr uint16_t kFlush = 0x04, kFuaToo = 0x0c, kMultiConn = 0x100;

// What a connection was asked for.
class Notes {
 public:
  void add(const Peer::Request& r) {
    constexpr const char* kNames[] = {"read", "write", "leave", "flush", "trim", "cache", "zero"};
    const std::lock_guard lock(mutex_);
    seen_.push_back(r.type == 2 || r.type == 3
                        ? kNames[r.type]
                        : fmt::format("{} {}+{}{}", kNames[r.type], r.offset, r.length,
                                      (r.flags & 1) != 0 ? " fua" : ""));
  }
  Seen seen() const {
    const std::lock_guard lock(mutex_);
    return seen_;
  }
  size_t count(const std::string& what) const {
    const Seen all = seen();
    return static_cast<size_t>(std::count(all.begin(), all.end(), what));
  }

 private:
  mutable std::mutex mutex_;
  Seen seen_;
};

class Durability : public ServerTest {
 protected:
  Durability() : path_(testing::TempDir() + "nbd_durable_" + std::to_string(::getpid())) {}

  void open(const std::string& uri, const std::string& keys = "") {
    on_fiber([&] {
      (void)graph_.add(block::Options::from_keys("driver=nbd,node-name=remote,uri=" + uri + keys));
      remote_ = graph_.attach("remote", "the test", block::Permissions::front_end(true));
    });
  }
  void write(uint64_t offset, uint64_t length, bool fua = false) {
    const Bytes data(length, std::byte{1});
    remote_.write(offset, base::SingleBuffer(data.data(), data.size()), {.fua = fua});
  }
  void read() {
    Bytes data(512);
    remote_.read(0, base::SingleBuffer(data.data(), data.size()));
  }
  void close() {
    on_fiber([&] {
      (void)error_number([&] { remote_.close(); });
      (void)error_number([&] { graph_.remove("remote"); });
    });
  }
  // Answers as it should be.
  static void answer(Peer& peer, const Peer::Request& r) {
    if (r.type == 0) {
      peer.chunk(r, 1, join({be64(r.offset), Bytes(r.length)}));
    } else if (r.type != 2) {
      peer.simple(r);
    }
  }

  const std::string path_;
  block::Handle remote_;
};

TEST_F(Durability, WhereTheServerHasNoFuaAFlushFollows) {
  for (const uint16_t flags : {kFlush, kFuaToo}) {
    Notes notes;
    HostileServer server(path_, [&](Peer& peer) {
      peer.enter({.flags = static_cast<uint16_t>(0x41 | flags)});
      for (;;) {
        const Peer::Request r = peer.request();
        notes.add(r);
        answer(peer, r);
      }
    });
    open(server.uri());
    on_fiber([&] {
      write(0, 512, true);
      remote_.write_zeroes(512, 512, {.fua = true});
      write(1024, 512);
    });
    if (flags == kFlush) {
      EXPECT_EQ(notes.seen(),
                (Seen{"write 0+512", "flush", "zero 512+512", "flush", "write 1024+512"}));
    } else {
      EXPECT_EQ(notes.seen(), (Seen{"write 0+512 fua", "zero 512+512 fua", "write 1024+512"}));
    }
    close();
    EXPECT_GE(notes.count("flush"), 1u) << "closing flushes";
  }
}

// A write that is acknowledged while a flush is under way may have come too late for it: when the
// connection breaks behind the flush it is done again, and what came before the flush is not.
TEST_F(Durability, AFlushCoversWhatWasAcknowledgedBeforeItBegan) {
  Notes again;
  HostileServer server(path_, [&](Peer& peer) {
    peer.enter();
    if (peer.number() > 0) {
      for (;;) {
        const Peer::Request r = peer.request();
        again.add(r);
        answer(peer, r);
      }
    }
    answer(peer, peer.request());  // a write
    const Peer::Request flush = peer.request();
    EXPECT_EQ(flush.type, 3);
    answer(peer, peer.request());  // another
    peer.simple(flush);
    (void)peer.request();  // a read
    throw Peer::Gone();
  });
  open(server.uri(), ",reconnect-delay=20,connections=1");
  std::atomic<bool> flushed{false};
  on_fiber([&] { write(0, 4096); });
  loops_.loop(0).post("flush", [&] {
    remote_.flush();
    flushed = true;
  });
  on_fiber([&] { write(65536, 4096); });
  for (int i = 0; i < 1000 && !flushed; ++i) ::usleep(5000);
  ASSERT_TRUE(flushed);
  on_fiber([&] { read(); });
  EXPECT_EQ(again.seen(), (Seen{"write 65536+4096", "read 0+512"}));
  close();
}

// A client that never flushes does not make this process keep all that it writes.
TEST_F(Durability, WhatIsKeptIsBounded) {
  Notes notes;
  HostileServer server(path_, [&](Peer& peer) {
    peer.enter({.size = uint64_t{1} << 30});
    for (;;) {
      const Peer::Request r = peer.request();
      notes.add(r);
      answer(peer, r);
    }
  });
  open(server.uri(), ",reconnect-delay=20");
  on_fiber([&] {
    for (uint64_t i = 0; i < 15; ++i) write(i << 22, 4 << 20);
  });
  EXPECT_EQ(notes.count("flush"), 0u);
  on_fiber([&] {
    for (uint64_t i = 0; i < 3; ++i) write(i << 22, 4 << 20);
  });
  EXPECT_EQ(notes.count("flush"), 1u);
  // Also where each write is durable by itself, behind one that is not.
  on_fiber([&] {
    write(0, 512);
    for (uint64_t i = 0; i < 18; ++i) write(i << 22, 4 << 20, true);
  });
  EXPECT_EQ(notes.count("flush"), 2u);
  close();
}

// A second connection that leads to something else would read and write two disks as one.
TEST_F(Durability, AConnectionToAnotherDiskIsNotUsed) {
  std::atomic<unsigned> wrong{0};
  HostileServer server(path_, [&](Peer& peer) {
    const bool other = peer.number() > 0;
    peer.enter({.size = other ? 2u << 20 : 1u << 20,
                .flags = static_cast<uint16_t>(0x41 | kFuaToo | kMultiConn)});
    for (;;) {
      const Peer::Request r = peer.request();
      if (other && r.type != 2) ++wrong;
      answer(peer, r);
    }
  });
  open(server.uri(), ",connections=2");
  const auto deadline = soon();
  // Requests on the other loop make it want a connection of its own.
  while (server.connections() < 2 && base::Clock::now() < deadline) {
    loops_.loop(1).call("read", [&] { read(); });
  }
  EXPECT_EQ(server.connections(), 2u);
  for (int i = 0; i < 100; ++i) loops_.loop(1).call("read", [&] { read(); });
  EXPECT_EQ(wrong, 0u);
  close();
}

}  // namespace
}  // namespace minivmm::nbd
