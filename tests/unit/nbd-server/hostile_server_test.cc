// SPDX-License-Identifier: Apache-2.0
// The node `nbd` with servers that break the protocol: each breach is an error of the request (or
// of opening), in bounded time and memory, and the node works again with a server that keeps to it.
#include "hostile_server.h"

#include <unistd.h>

#include <chrono>
#include <functional>
#include <ostream>
#include <thread>
#include <vector>

#include "block/graph/root.h"
#include "fixture.h"
#include "tests/support/process.h"

namespace minivmm::nbd {
namespace {

using Peer = HostilePeer;
using Terms = HostilePeer::Terms;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr uint16_t kNone = 0, kData = 1, kHole = 2, kStatus = 5, kError = 0x8001;
constexpr uint32_t kLength = 4096;  // of every request here
// Under which every answer to a breach is there; a loaded machine under a sanitizer takes its time.
constexpr auto kSoon = seconds(8);

enum class Ask { kRead, kWrite, kFlush, kExtents };

class Hostile : public ServerTest {
 protected:
  Hostile() : path_(testing::TempDir() + "nbd_hostile_" + std::to_string(::getpid())) {}

  void open(const std::string& uri, const std::string& keys = "") {
    on_fiber([&] {
      (void)graph_.add(block::Options::from_keys("driver=nbd,node-name=remote,uri=" + uri + keys));
      remote_ = graph_.attach("remote", "the test", block::Permissions::front_end(true));
    });
  }
  // The errno value of one request; 0: it succeeded.
  int ask(Ask what) {
    return on_fiber([&] {
      Bytes data(kLength, std::byte{'-'});
      return error_number([&] {
        switch (what) {
          case Ask::kRead:
            remote_.read(8192, base::SingleBuffer(data.data(), data.size()));
            seen_ = data;
            break;
          case Ask::kWrite:
            remote_.write(8192, base::SingleBuffer(data.data(), data.size()));
            break;
          case Ask::kFlush:
            remote_.flush();
            break;
          case Ask::kExtents:
            status_ = remote_.block_status(8192, kLength);
        }
      });
    });
  }
  void close() {
    on_fiber([&] {
      (void)error_number([&] { remote_.close(); });
      (void)error_number([&] { graph_.remove("remote"); });
    });
  }

  const std::string path_;
  block::Handle remote_;
  Bytes seen_;
  block::BlockStatus status_;
};

// --- the handshake ---

struct Opening {
  const char* what;
  std::function<void(Peer&)> talk;
  int expected = -1;  // errno; -1: any but 0
  friend void PrintTo(const Opening& c, std::ostream* out) { *out << c.what; }
};

class HostileOpening : public Hostile, public testing::WithParamInterface<Opening> {};

TEST_P(HostileOpening, IsAnErrorOfOpening) {
  const size_t before = descriptors();
  {
    HostileServer server(path_, [](Peer& peer) {
      GetParam().talk(peer);
      peer.wait_for_end();
    });
    const auto begin = std::chrono::steady_clock::now();
    const int err = error_number([&] { open(server.uri()); });
    EXPECT_LT(std::chrono::steady_clock::now() - begin, kSoon);
    if (GetParam().expected < 0) {
      EXPECT_NE(err, 0);
    } else {
      EXPECT_EQ(err, GetParam().expected);
    }
    close();
  }
  EXPECT_LE(descriptors(), before + 2);  // of libnbd's own, once
}

// The first option is answered so, whatever it is.
std::function<void(Peer&)> first_answer(uint64_t magic, uint32_t option, uint32_t type,
                                        uint32_t length, const Bytes& data) {
  return [=](Peer& peer) {
    peer.greet();
    const uint32_t id = peer.option().id;
    peer.send(join({be64(magic), be32(option != 0 ? option : id), be32(type), be32(length), data}));
  };
}
// All is right up to GO, whose INFO is this.
std::function<void(Peer&)> with(const Terms& terms) {
  return [=](Peer& peer) {
    peer.enter(terms);
    for (;;) peer.simple(peer.request());
  };
}
std::function<void(Peer&)> go_answer(uint32_t type, const Bytes& data) {
  return [=](Peer& peer) {
    peer.greet();
    for (;;) {
      const Peer::Option asked = peer.option();
      if (asked.id == 7) {
        peer.answer(asked, type, data);
        peer.answer(asked, kAck);
        return;
      }
      peer.answer(asked, kErrUnsup);
    }
  };
}
std::function<void(Peer&)> context_answer(const Bytes& data) {
  return [=](Peer& peer) {
    peer.greet();
    for (;;) {
      const Peer::Option asked = peer.option();
      if (asked.id == 10) {
        peer.answer(asked, 4, data);
        return;
      }
      peer.answer(asked, asked.id == 8 ? kAck : kErrUnsup);
    }
  };
}

constexpr uint64_t kReplyMagic = 0x3e889045565a9;
const Opening kOpenings[] = {
    {"nothing but the end", [](Peer&) { throw Peer::Gone(); }},
    {"not an NBD server", [](Peer& p) { p.send(text("SSH-2.0-OpenSSH_9.2p1 Debian\r\n")); }},
    {"the end within the greeting",
     [](Peer& p) {
       p.send(text("NBDMAGIC"));
       throw Peer::Gone();
     }},
    {"a greeting of neither style",
     [](Peer& p) {
       p.send(join({text("NBDMAGIC"), be64(12345), Bytes(140)}));
     }},
    {"the end within an answer",
     [](Peer& p) {
       p.greet();
       (void)p.option();
       p.send(be64(kReplyMagic));
       throw Peer::Gone();
     }},
    {"an answer without its magic", first_answer(kReplyMagic + 1, 0, kAck, 0, {})},
    {"an answer to another option", first_answer(kReplyMagic, 77, kAck, 0, {})},
    {"an answer of 4 GiB", first_answer(kReplyMagic, 0, 3, 0xffffffff, Bytes(100'000))},
    {"an answer of a type that nobody asked for", first_answer(kReplyMagic, 0, 12345, 0, {})},
    {"GO without an export's size", go_answer(3, join({be16(2), text("words")}))},
    {"GO with a size in too few bytes", go_answer(3, join({be16(0), be32(1 << 20)}))},
    {"GO refused with words of 5000 bytes", go_answer(0x80000006, Bytes(5000, std::byte{'w'}))},
    {"GO refused for a reason that does not exist", go_answer(0x8000ffff, {})},
    {"GO refused by the server's policy", go_answer(0x80000002, text("no"))},
    {"a context without a name", context_answer(Bytes(3))},
    {"a context whose name has 20,000 bytes", context_answer(Bytes(20'000, std::byte{'c'}))},
    {"a disk larger than any may be", with({.size = (uint64_t{1} << 63) - 512}), EFBIG},
    {"a disk of more bytes than can be said", with({.size = ~uint64_t{0}}), EFBIG},
    {"a disk that is for reading only", with({.flags = 0x0f}), EROFS},
};

INSTANTIATE_TEST_SUITE_P(All, HostileOpening, testing::ValuesIn(kOpenings));

// Odd, and nothing that requests cannot be made to suit.
TEST_F(Hostile, StrangeBlockSizesAreSurvived) {
  const uint32_t sizes[][3] = {{0, 0, 0},
                               {3, 512, 1024},
                               {512, 256, 128},
                               {65536, 65536, 512},
                               {1, 1, 0xffffffff},
                               {4096, 4096, 5000},
                               {16 << 20, 16 << 20, 32 << 20}};
  for (const auto& each : sizes) {
    SCOPED_TRACE(each[0]);
    HostileServer server(path_, [&](Peer& peer) {
      peer.enter({.block_sizes = join({be32(each[0]), be32(each[1]), be32(each[2])})});
      peer.answer_all(0, [&](const Peer::Request& asked) {
        peer.chunk(asked, kData, join({be64(asked.offset), Bytes(asked.length, std::byte{'x'})}));
      });
    });
    if (error_number([&] { open(server.uri()); }) != 0) continue;
    EXPECT_EQ(ask(Ask::kRead), 0);
    EXPECT_EQ(seen_, Bytes(kLength, std::byte{'x'}));
    EXPECT_EQ(ask(Ask::kWrite), 0);
    close();
  }
}

// --- transmission ---

struct Breach {
  const char* what;
  Ask ask;
  std::function<void(Peer&, const Peer::Request&)> answer;
  bool connection_ends = true;  // or it is an error of the request alone
  bool structured = true;
  friend void PrintTo(const Breach& c, std::ostream* out) { *out << c.what; }
};

class HostileAnswer : public Hostile, public testing::WithParamInterface<Breach> {};

TEST_P(HostileAnswer, IsAnErrorOfTheRequest) {
  const Breach& breach = GetParam();
  HostileServer server(path_, [&](Peer& peer) {
    if (peer.number() > 0) return peer.serve();
    peer.enter({.structured = breach.structured});
    breach.answer(peer, peer.request());
    // Where it was no more than an error, what comes next is answered properly.
    for (;;) {
      const Peer::Request asked = peer.request();
      if (asked.type == 2) return;
      if (asked.type != 0 || !breach.structured) {
        peer.simple(asked, 0, asked.type == 0 ? Bytes(asked.length, std::byte{'x'}) : Bytes{});
      } else {
        peer.chunk(asked, kData, join({be64(asked.offset), Bytes(asked.length, std::byte{'x'})}));
      }
    }
  });
  open(server.uri());
  const auto begin = std::chrono::steady_clock::now();
  const uint64_t memory = resident_mib();
  EXPECT_NE(ask(breach.ask), 0);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, kSoon);
  if (kMemoryIsOurs) {
    EXPECT_LE(resident_mib(), memory + 64);
  }
  int err = -1;
  while (err != 0 && std::chrono::steady_clock::now() - begin < kSoon) {
    err = ask(Ask::kRead);
    if (err != 0) std::this_thread::sleep_for(milliseconds(10));
  }
  EXPECT_EQ(err, 0);
  EXPECT_EQ(seen_, Bytes(kLength, std::byte{'x'}));
  EXPECT_EQ(server.connections(), breach.connection_ends ? 2u : 1u);
  close();
}

Peer::Request other(const Peer::Request& asked) {
  Peer::Request out = asked;
  out.cookie += 1000;
  return out;
}
Bytes at(uint64_t offset, size_t size) { return join({be64(offset), Bytes(size)}); }

const Breach kBreaches[] = {
    {"an answer without its magic", Ask::kRead,
     [](Peer& p, auto&) { p.send(Bytes(64, std::byte{7})); }},
    {"an answer to a request that was not made", Ask::kRead,
     [](Peer& p, auto& r) { p.chunk(other(r), kData, at(r.offset, r.length)); }},
    {"a simple answer to a request that was not made", Ask::kFlush,
     [](Peer& p, auto& r) { p.simple(other(r)); }},
    {"the end within an answer", Ask::kRead,
     [](Peer& p, auto& r) {
       p.send(join({be32(0x668e33ef), be16(1), be16(kData), be64(r.cookie), be32(8 + r.length),
                    Bytes(100)}));
       throw Peer::Gone();
     }},
    {"the end within simple data", Ask::kRead,
     [](Peer& p, auto& r) {
       p.simple(r, 0, Bytes(100));
       throw Peer::Gone();
     },
     true, false},
    {"the end instead of an answer", Ask::kWrite, [](Peer&, auto&) { throw Peer::Gone(); }},
    {"an error that does not exist", Ask::kWrite, [](Peer& p, auto& r) { p.simple(r, 0xffffffff); },
     false},
    {"an error that does not exist, with its data", Ask::kRead,
     [](Peer& p, auto& r) { p.simple(r, 12345); }, false, false},
    {"more data than were asked for", Ask::kRead,
     [](Peer& p, auto& r) { p.chunk(r, kData, at(r.offset, r.length + 512)); }},
    {"data before those that were asked for", Ask::kRead,
     [](Peer& p, auto& r) { p.chunk(r, kData, at(r.offset - 512, r.length)); }},
    {"data behind those that were asked for", Ask::kRead,
     [](Peer& p, auto& r) { p.chunk(r, kData, at(r.offset + 512, r.length)); }},
    {"data at the end of all numbers", Ask::kRead,
     [](Peer& p, auto& r) { p.chunk(r, kData, at(~uint64_t{0} - 100, r.length)); }},
    {"data for a write", Ask::kWrite,
     [](Peer& p, auto& r) { p.chunk(r, kData, at(r.offset, r.length)); }},
    {"data without an offset", Ask::kRead, [](Peer& p, auto& r) { p.chunk(r, kData, Bytes(4)); }},
    {"a chunk of 4 GiB", Ask::kRead,
     [](Peer& p, auto& r) {
       p.send(join({be32(0x668e33ef), be16(1), be16(kData), be64(r.cookie), be32(0xffffffff),
                    Bytes(100'000)}));
     }},
    {"a hole that is larger than what was asked for", Ask::kRead,
     [](Peer& p, auto& r) {
       p.chunk(r, kHole, join({be64(r.offset), be32(r.length + 1)}));
     }},
    {"a hole of 4 GiB", Ask::kRead,
     [](Peer& p, auto& r) {
       p.chunk(r, kHole, join({be64(r.offset), be32(0xffffffff)}));
     }},
    {"a hole without a length", Ask::kRead,
     [](Peer& p, auto& r) { p.chunk(r, kHole, be64(r.offset)); }},
    {"no data at all", Ask::kRead, [](Peer& p, auto& r) { p.chunk(r, kNone, {}); }, false},
    {"half of the data", Ask::kRead,
     [](Peer& p, auto& r) { p.chunk(r, kData, at(r.offset, r.length / 2)); }, false},
    {"nothing, and more to come of a kind that nobody knows", Ask::kRead,
     [](Peer& p, auto& r) { p.chunk(r, 99, Bytes(100)); }},
    {"an error of a kind that nobody knows", Ask::kWrite,
     [](Peer& p, auto& r) {
       p.chunk(r, 0x8063, join({be32(5), be16(0)}));
     },
     false},
    {"an error that is none", Ask::kFlush,
     [](Peer& p, auto& r) {
       p.chunk(r, kError, join({be32(0), be16(0)}));
     },
     false},
    {"an error whose words are longer than it", Ask::kFlush,
     [](Peer& p, auto& r) {
       p.chunk(r, kError, join({be32(5), be16(500), text("short")}));
     }},
    {"an error in too few bytes", Ask::kFlush,
     [](Peer& p, auto& r) { p.chunk(r, kError, be32(5)); }},
    {"no extents", Ask::kExtents, [](Peer& p, auto& r) { p.chunk(r, kNone, {}); }, false},
    {"a context without extents", Ask::kExtents,
     [](Peer& p, auto& r) { p.chunk(r, kStatus, be32(1)); }},
    {"extents in a number of bytes that is none", Ask::kExtents,
     [](Peer& p, auto& r) {
       p.chunk(r, kStatus, join({be32(1), be32(512), be16(0)}));
     }},
    {"extents of a context that was not agreed on", Ask::kExtents,
     [](Peer& p, auto& r) {
       p.chunk(r, kStatus, join({be32(9), be32(r.length), be32(0)}));
     },
     false},
    {"extents for a read", Ask::kRead,
     [](Peer& p, auto& r) {
       p.chunk(r, kStatus, join({be32(1), be32(r.length), be32(0)}));
     }},
    {"a simple answer where a chunk has to come", Ask::kExtents,
     [](Peer& p, auto& r) { p.simple(r); }, false},
};

INSTANTIATE_TEST_SUITE_P(All, HostileAnswer, testing::ValuesIn(kBreaches));

// What an extent says beyond the question is not believed.
TEST_F(Hostile, ExtentsBeyondTheQuestionAreCut) {
  HostileServer server(path_, [](Peer& peer) {
    peer.enter();
    peer.answer_all(7, [&](const Peer::Request& asked) {
      peer.chunk(asked, kStatus, join({be32(1), be32(0xffffffff), be32(3)}));
    });
  });
  open(server.uri());
  EXPECT_EQ(ask(Ask::kExtents), 0);
  EXPECT_EQ(status_.length, kLength);
  EXPECT_TRUE(status_.zero);
  close();
}

// The same half twice is as many bytes as were asked for, and is not what was asked for.
TEST_F(Hostile, TheSameDataTwiceIsNotTheWhole) {
  HostileServer server(path_, [](Peer& peer) {
    peer.enter();
    peer.answer_all(0, [&](const Peer::Request& asked) {
      const uint32_t half = asked.length / 2;
      const Bytes data = join({be64(asked.offset), Bytes(half, std::byte{'x'})});
      peer.chunk(asked, kData, data, /*done=*/false);
      peer.chunk(asked, kData, data);
    });
  });
  open(server.uri());
  EXPECT_EQ(ask(Ask::kRead), EPROTO);
  EXPECT_EQ(server.connections(), 1u);
  close();
}

// Parts in any order, data and holes, are.
TEST_F(Hostile, PartsInAnyOrderAreTheWhole) {
  HostileServer server(path_, [](Peer& peer) {
    peer.enter();
    peer.answer_all(0, [&](const Peer::Request& asked) {
      const uint32_t part = asked.length / 4;
      const auto data = [&](uint32_t n) {
        return join({be64(asked.offset + n * part), Bytes(part, std::byte{'x'})});
      };
      peer.chunk(asked, kData, data(3), /*done=*/false);
      peer.chunk(asked, kHole, join({be64(asked.offset + part), be32(part)}), /*done=*/false);
      peer.chunk(asked, kData, data(0), /*done=*/false);
      peer.chunk(asked, kData, data(2), /*done=*/false);
      peer.chunk(asked, kNone, {});
    });
  });
  open(server.uri());
  EXPECT_EQ(ask(Ask::kRead), 0);
  Bytes expected(kLength, std::byte{'x'});
  std::fill_n(expected.begin() + kLength / 4, kLength / 4, std::byte{0});
  EXPECT_EQ(seen_, expected);
  close();
}

// With reconnect-delay the request is held and made again, but not for ever.
TEST_F(Hostile, ARequestThatAlwaysBreaksTheConnectionIsGivenUp) {
  HostileServer server(path_, [](Peer& peer) {
    peer.enter();
    (void)peer.request();
    peer.send(Bytes(64, std::byte{7}));
    peer.wait_for_end();
  });
  open(server.uri(), ",reconnect-delay=60");
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(ask(Ask::kRead), EIO);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, kSoon);
  EXPECT_GE(server.connections(), 3u);
  close();
}

// A server that says nothing, and one that never comes to the end of an answer.
TEST_F(Hostile, SilenceAndEndlessAnswersAreCutAfterTheTimeout) {
  for (const bool endless : {false, true}) {
    SCOPED_TRACE(endless);
    HostileServer server(path_, [&](Peer& peer) {
      if (peer.number() > 0) return peer.serve();
      peer.enter();
      const Peer::Request asked = peer.request();
      while (endless) peer.chunk(asked, kData, at(asked.offset, 512), /*done=*/false);
      peer.wait_for_end();
    });
    open(server.uri(), ",request-timeout=1,reconnect-delay=20");
    const uint64_t memory = resident_mib();
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_EQ(ask(Ask::kRead), 0);
    const auto took = std::chrono::steady_clock::now() - begin;
    EXPECT_GE(took, milliseconds(900));
    EXPECT_LT(took, kSoon);
    EXPECT_EQ(seen_, Bytes(kLength, std::byte{'x'}));
    if (kMemoryIsOurs) {
      EXPECT_LE(resident_mib(), memory + 16);
    }
    close();
  }
}

// While answers come, however slowly, nothing is cut.
TEST_F(Hostile, ASlowServerIsNotASilentOne) {
  HostileServer server(path_, [&](Peer& peer) {
    peer.enter();
    for (;;) {
      const Peer::Request asked = peer.request();
      if (asked.type == 2) return;
      std::this_thread::sleep_for(milliseconds(asked.type == 1 ? 300 : 0));
      peer.simple(asked);
    }
  });
  open(server.uri(), ",request-timeout=1");
  for (int i = 0; i < 5; ++i) EXPECT_EQ(ask(Ask::kWrite), 0);
  EXPECT_EQ(server.connections(), 1u);
  close();
}

}  // namespace
}  // namespace minivmm::nbd
