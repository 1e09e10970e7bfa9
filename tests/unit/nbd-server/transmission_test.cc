// SPDX-License-Identifier: Apache-2.0
// Every command with every flag, right and wrong, over a node in memory.
#include <fcntl.h>
#include <sys/socket.h>

#include <algorithm>
#include <map>
#include <random>

#include "fixture.h"

namespace minivmm::nbd {
namespace {

constexpr uint16_t kRead = 0, kWrite = 1, kDisc = 2, kFlush = 3, kTrim = 4, kCache = 5, kZeroes = 6,
                   kStatus = 7;
constexpr uint16_t kFua = 1, kNoHole = 2, kDf = 4, kReqOne = 8, kFastZero = 16;
constexpr uint32_t kPerm = 1, kIo = 5, kInval = 22, kNoSpc = 28, kNotSup = 95;
constexpr uint64_t kSize = 4 << 20;

Bytes pattern(size_t size, unsigned seed) {
  Bytes out(size);
  for (size_t i = 0; i < size; ++i) out[i] = static_cast<std::byte>(seed * 37 + i / 16 + i % 251);
  return out;
}

class Transmission : public ServerTest {
 protected:
  Transmission() { add("disk", "driver=memory,size=4M"); }
};

TEST_F(Transmission, WhatIsWrittenIsReadOnAnyConnection) {
  Client writer = connect();
  Client reader = connect();
  writer.enter("disk", true);
  reader.enter("disk");
  // Small, odd, unaligned, larger than what one receive brings, and the whole disk.
  const std::pair<uint64_t, uint32_t> ranges[] = {{0, 512},         {1, 1},         {511, 4097},
                                                  {65536, 300'000}, {kSize - 1, 1}, {0, kSize}};
  unsigned seed = 0;
  for (const auto& [offset, length] : ranges) {
    const Bytes data = pattern(length, ++seed);
    EXPECT_EQ(writer.error_of(kWrite, offset, length, seed % 2 ? kFua : 0, data), 0u);
    EXPECT_TRUE(reader.read(offset, length) == data) << offset << "+" << length;
  }
}

TEST_F(Transmission, EveryCommandTakesExactlyItsFlags) {
  Client client = connect();
  client.enter("disk", true, true);
  const std::map<uint16_t, uint16_t> allowed = {
      {kWrite, 0}, {kFlush, 0}, {kTrim, 0}, {kCache, 0}, {kStatus, kReqOne}, {kZeroes, kNoHole}};
  for (const auto& [command, flags] : allowed) {
    const uint32_t length = command == kFlush ? 0 : 512;
    const Bytes payload(command == kWrite ? 512 : 0);
    for (unsigned bit = 0; bit < 16; ++bit) {
      const auto flag = static_cast<uint16_t>(1u << bit);
      if (command == kZeroes && flag == kFastZero) continue;  // may say ENOTSUP; tested apart
      // FUA is accepted on all commands.
      const uint32_t expected = (flag & (flags | kFua)) != 0 ? 0 : kInval;
      EXPECT_EQ(client.error_of(command, 0, length, flag, payload), expected)
          << command << " flag " << flag;
    }
  }
  EXPECT_EQ(client.error_of(kRead, 0, 512, kDf), 0u);
  EXPECT_EQ(client.error_of(kRead, 0, 512, kFua), 0u);
  EXPECT_EQ(client.error_of(kRead, 0, 512, kReqOne), kInval);
  EXPECT_EQ(client.error_of(kRead, 0, 512, 0x8000), kInval);
}

TEST_F(Transmission, DfNeedsStructuredReplies) {
  Client client = connect();
  client.enter("disk");
  client.send(client.request(kRead, 1, 0, 512, kDf));
  EXPECT_EQ(client.simple().error, kInval);  // and no data follows
  EXPECT_EQ(client.read(0, 512).size(), 512u);
}

TEST_F(Transmission, RangesPastTheEndAreRefused) {
  Client client = connect();
  client.enter("disk", true, true);
  const std::pair<uint64_t, uint32_t> outside[] = {{kSize, 1},
                                                   {kSize - 1, 2},
                                                   {0, static_cast<uint32_t>(kSize + 1)},
                                                   {~uint64_t{0}, 1},
                                                   {~uint64_t{0} - 511, 1024},
                                                   {uint64_t{1} << 63, 512}};
  for (const auto& [offset, length] : outside) {
    EXPECT_EQ(client.error_of(kRead, offset, length), kInval);
    EXPECT_EQ(client.error_of(kTrim, offset, length), kInval);
    EXPECT_EQ(client.error_of(kCache, offset, length), kInval);
    EXPECT_EQ(client.error_of(kStatus, offset, length), kInval);
    EXPECT_EQ(client.error_of(kWrite, offset, length, 0, Bytes(length)), kNoSpc);
    EXPECT_EQ(client.error_of(kZeroes, offset, length), kNoSpc);
  }
  EXPECT_EQ(client.error_of(kZeroes, 0, 0xffffffff), kNoSpc);
}

TEST_F(Transmission, EmptyRangesDoNothing) {
  Client client = connect();
  client.enter("disk", true, true);
  for (const uint16_t command : {kRead, kWrite, kTrim, kCache, kZeroes}) {
    EXPECT_EQ(client.error_of(command, 0, 0), 0u) << command;
    EXPECT_EQ(client.error_of(command, kSize, 0), 0u) << command;
  }
  EXPECT_EQ(client.error_of(kStatus, 0, 0), kInval);  // must report at least one extent
  // A simple reply to an empty READ is a bare header.
  Client simple = connect();
  simple.enter("disk");
  EXPECT_EQ(simple.read(0, 0), Bytes());
  EXPECT_EQ(simple.read(0, 1).size(), 1u);
}

TEST_F(Transmission, FlushTakesNoRange) {
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.error_of(kFlush, 0, 0), 0u);
  EXPECT_EQ(client.error_of(kFlush, 512, 0), kInval);
  EXPECT_EQ(client.error_of(kFlush, 0, 512), kInval);
}

TEST_F(Transmission, UnknownCommandsAreErrorsAndNothingIsLost) {
  Client client = connect();
  client.enter("disk", true);
  for (const uint16_t command : {uint16_t{8}, uint16_t{9}, uint16_t{0xffff}}) {
    client.send(client.request(command, 42, 0, 512));
    const Reply reply = client.chunk();
    EXPECT_EQ(reply.error, kInval);
    // With a text for the client's user: error, text length, text.
    EXPECT_EQ(reply.payload.size(), 6 + reply.number(4, 2));
    EXPECT_GT(reply.payload.size(), 6u);
  }
  EXPECT_EQ(client.error_of(kRead, 0, 512), 0u);
  EXPECT_EQ(client.error_of(kStatus, 0, 512), kInval);  // no context was selected
}

TEST_F(Transmission, TooLargeRequestsAreRefused) {
  add("huge", "driver=null,size=1T");
  Client client = connect();
  client.enter("huge", true);
  constexpr uint32_t kMax = 32 << 20;
  EXPECT_EQ(client.error_of(kRead, 0, kMax + 1), kInval);
  EXPECT_EQ(client.error_of(kRead, 0, 0xffffffff), kInval);
  EXPECT_EQ(client.error_of(kWrite, 0, kMax + 1, 0, Bytes(kMax + 1)), kInval);
  EXPECT_EQ(client.error_of(kWrite, 0, kMax, 0, Bytes(kMax)), 0u);
  // Commands without payload may be as large as they like.
  EXPECT_EQ(client.error_of(kZeroes, 0, 0xffffffff), 0u);
  EXPECT_EQ(client.error_of(kTrim, 0, 0xffffffff), 0u);
  // A payload that nobody could want to skip.
  client.send(client.request(kWrite, 1, 0, 0xffffffff));
  EXPECT_TRUE(client.closed());
}

TEST_F(Transmission, ReadOnlyExportsRefuseEveryChange) {
  add("ro", "driver=memory,size=1M", false);
  Client client = connect();
  client.enter("ro", true);
  EXPECT_EQ(client.error_of(kWrite, 0, 4096, 0, Bytes(4096)), kPerm);
  EXPECT_EQ(client.error_of(kWrite, 0, 600'000, 0, Bytes(600'000)), kPerm);  // payload skipped
  EXPECT_EQ(client.error_of(kTrim, 0, 512), kPerm);
  EXPECT_EQ(client.error_of(kZeroes, 0, 512), kPerm);
  EXPECT_EQ(client.error_of(kFlush, 0, 0), 0u);
  EXPECT_EQ(client.error_of(kCache, 0, 512), 0u);
  EXPECT_EQ(client.error_of(kRead, 0, 512), 0u);
}

TEST_F(Transmission, ABadMagicEndsTheSession) {
  Client client = connect();
  client.enter("disk");
  Bytes bad = client.request(kRead, 1, 0, 512);
  bad[0] = std::byte{0};
  client.send(bad);
  EXPECT_TRUE(client.closed());
}

TEST_F(Transmission, DisconnectAnswersWhatIsInFlightFirst) {
  add("slow", "driver=null,size=1M,latency-ns=50000000");
  Client client = connect();
  client.enter("slow");
  Bytes all;
  for (uint64_t i = 0; i < 3; ++i) {
    all = join({all, client.request(kRead, i, i * 8192, 512)});
  }
  client.send(join({all, client.request(kDisc, 9, 0, 0)}));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(client.simple(512).error, 0u);
  EXPECT_TRUE(client.closed());
}

TEST_F(Transmission, HalfCloseAnswersWhatIsInFlightFirst) {
  add("slow", "driver=null,size=1M,latency-ns=50000000");
  Client client = connect();
  client.enter("slow");
  client.send(client.request(kRead, 5, 0, 512));
  ::shutdown(client.fd(), SHUT_WR);
  const Reply reply = client.simple(512);
  EXPECT_EQ(reply.error, 0u);
  EXPECT_EQ(reply.cookie, 5u);
  EXPECT_TRUE(client.closed());
}

TEST_F(Transmission, ManyInFlightAreAnsweredByTheirCookies) {
  add("slow", "driver=null,size=64M,latency-ns=20000000");
  Client client = connect();
  client.enter("slow");
  Bytes all;
  constexpr uint64_t kCount = 200;
  // Gaps, so that each is a request of its own.
  for (uint64_t i = 0; i < kCount; ++i) {
    all = join({all, client.request(kRead, 1000 + i, i * 65536, 4096)});
  }
  const auto begin = base::Clock::now();
  client.send(all);
  std::vector<uint64_t> seen;
  for (uint64_t i = 0; i < kCount; ++i) seen.push_back(client.simple(4096).cookie);
  // One after the other they would take four seconds.
  EXPECT_LT(base::Clock::now() - begin, std::chrono::seconds(2));
  std::sort(seen.begin(), seen.end());
  for (uint64_t i = 0; i < kCount; ++i) EXPECT_EQ(seen[i], 1000 + i);
}

TEST_F(Transmission, AdjacentRequestsOfOneBatchKeepTheirOwnReplies) {
  Client client = connect();
  client.enter("disk");
  const Bytes data = pattern(64 * 4096, 3);
  Bytes writes;
  Bytes reads;
  for (uint64_t i = 0; i < 64; ++i) {
    const Bytes block(data.begin() + static_cast<ptrdiff_t>(i * 4096),
                      data.begin() + static_cast<ptrdiff_t>((i + 1) * 4096));
    writes = join({writes, client.request(kWrite, i, i * 4096, 4096), block});
    reads = join({reads, client.request(kRead, i, i * 4096, 4096)});
  }
  client.send(writes);
  for (uint64_t i = 0; i < 64; ++i) EXPECT_EQ(client.simple().error, 0u);
  client.send(reads);
  for (uint64_t i = 0; i < 64; ++i) {
    const Reply reply = client.simple(4096);
    EXPECT_TRUE(std::equal(reply.payload.begin(), reply.payload.end(),
                           data.begin() + static_cast<ptrdiff_t>(reply.cookie * 4096)));
  }
}

// One bad block in the middle of what was merged: only its request fails.
TEST_F(Transmission, AnErrorReachesTheRequestThatItBelongsTo) {
  const std::string where = ",offset=20480,length=512,file.driver=memory,file.size=1M";
  add("bad read", "driver=fault,op=read,errno=EIO" + where);
  add("bad write", "driver=fault,op=write,errno=EIO" + where);
  add("full", "driver=fault,op=write,errno=ENOSPC" + where);
  for (const auto& [name, command, error] :
       {std::tuple{"bad read", kRead, kIo}, std::tuple{"bad write", kWrite, kIo},
        std::tuple{"full", kWrite, kNoSpc}}) {
    Client client = connect();
    client.enter(name, true);
    Bytes batch;
    for (uint64_t i = 0; i < 16; ++i) {
      batch = join({batch, client.request(command, i, i * 4096, 4096),
                    command == kWrite ? pattern(4096, 7) : Bytes()});
    }
    client.send(batch);
    for (int i = 0; i < 16; ++i) {
      const Reply reply = client.chunk();
      EXPECT_EQ(reply.error, reply.cookie == 5 ? error : 0u) << reply.cookie;
    }
  }
}

// It answers FAST_ZERO; clients take it for nothing else.
TEST_F(Transmission, NotSupportedIsSaidOnlyOfFastZeroes) {
  add("no trim", "driver=fault,op=discard,errno=ENOTSUP,file.driver=memory,file.size=1M");
  for (const bool structured : {false, true}) {
    Client client = connect();
    client.enter("no trim", structured);
    EXPECT_EQ(client.error_of(kTrim, 0, 4096), kInval);
  }
}

TEST_F(Transmission, AFailedFlushIsReported) {
  add("bad", "driver=fault,op=flush,count=1,errno=EIO,file.driver=memory,file.size=1M");
  Client client = connect();
  client.enter("bad", true);
  EXPECT_EQ(client.error_of(kWrite, 0, 512, 0, Bytes(512)), 0u);
  EXPECT_EQ(client.error_of(kFlush, 0, 0), kIo);
  EXPECT_EQ(client.error_of(kFlush, 0, 0), 0u);
}

TEST_F(Transmission, ZeroesAndTrim) {
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.error_of(kWrite, 0, 65536, 0, pattern(65536, 1)), 0u);
  EXPECT_EQ(client.error_of(kZeroes, 4096, 8192, kFua), 0u);
  EXPECT_EQ(client.error_of(kZeroes, 16384, 100, kNoHole), 0u);
  EXPECT_EQ(client.error_of(kTrim, 32768, 4096, kFua), 0u);
  const Bytes now = client.read(0, 65536);
  Bytes expected = pattern(65536, 1);
  std::fill_n(expected.begin() + 4096, 8192, std::byte{0});
  std::fill_n(expected.begin() + 16384, 100, std::byte{0});
  // What was trimmed may read as anything.
  std::copy_n(now.begin() + 32768, 4096, expected.begin() + 32768);
  EXPECT_TRUE(now == expected);
}

TEST_F(Transmission, FastZeroFailsWhereItWouldHaveToWrite) {
  add("slowzero", "driver=fault,op=zero,errno=ENOTSUP,file.driver=memory,file.size=1M");
  Client client = connect();
  client.enter("slowzero", true);
  EXPECT_EQ(client.error_of(kZeroes, 0, 4096, kFastZero), kNotSup);
}

// Data, hole, data: three chunks, of which the hole carries nothing; DF asks for one.
TEST_F(Transmission, HolesAreToldNotSent) {
  const std::string path = testing::TempDir() + "nbd_holes.raw";
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(::ftruncate(fd, 1 << 20), 0);
  const Bytes data = pattern(65536, 9);
  ASSERT_EQ(::pwrite(fd, data.data(), data.size(), 0), 65536);
  ASSERT_EQ(::pwrite(fd, data.data(), data.size(), 262144), 65536);
  ::close(fd);
  add("holes", "driver=file,filename=" + path);
  Client client = connect();
  client.enter("holes", true, true);

  client.send(client.request(kRead, 1, 0, 327680));
  const Reply first = client.chunk();
  EXPECT_EQ(first.type, 1);
  EXPECT_EQ(first.flags, 0);
  EXPECT_EQ(first.number(0, 8), 0u);
  EXPECT_TRUE(std::equal(data.begin(), data.end(), first.payload.begin() + 8));
  const Reply second = client.chunk();
  EXPECT_EQ(second.type, 2);
  EXPECT_EQ(second.number(0, 8), 65536u);
  EXPECT_EQ(second.number(8, 4), 196608u);
  const Reply third = client.chunk();
  EXPECT_EQ(third.type, 1);
  EXPECT_EQ(third.flags, 1);
  EXPECT_EQ(third.number(0, 8), 262144u);
  EXPECT_EQ(third.payload.size(), 8u + 65536);

  client.send(client.request(kRead, 2, 0, 327680, kDf));
  const Reply whole = client.chunk();
  EXPECT_EQ(whole.type, 1);
  EXPECT_EQ(whole.flags, 1);
  EXPECT_EQ(whole.payload.size(), 8u + 327680);

  client.send(client.request(kRead, 3, 65536, 131072));
  const Reply hole = client.chunk();
  EXPECT_EQ(hole.type, 2);
  EXPECT_EQ(hole.flags, 1);

  // The same as extents: data, hole that reads as zeroes, data, hole.
  client.send(client.request(kStatus, 4, 0, 1 << 20));
  const Reply status = client.chunk();
  EXPECT_EQ(status.type, 5);
  ASSERT_EQ(status.payload.size(), 4u + 4 * 8);
  EXPECT_EQ(status.number(0, 4), 1u);
  const uint64_t expected[] = {65536, 0, 196608, 3, 65536, 0, 720896, 3};
  for (size_t i = 0; i < 8; ++i) EXPECT_EQ(status.number(4 + 4 * i, 4), expected[i]);
  client.send(client.request(kStatus, 5, 1000, 100'000, kReqOne));
  const Reply one = client.chunk();
  ASSERT_EQ(one.payload.size(), 4u + 8);
  EXPECT_EQ(one.number(4, 4), 64536u);
  ::unlink(path.c_str());
}

TEST_F(Transmission, BytesThatArriveOneByOneAreRequestsToo) {
  Client client = connect();
  client.enter("disk");
  const Bytes data = pattern(100, 5);
  const Bytes all =
      join({client.request(kWrite, 1, 50, 100), data, client.request(kRead, 2, 50, 100)});
  for (const std::byte byte : all) {
    client.send({byte});
    ::usleep(50);
  }
  EXPECT_EQ(client.simple().error, 0u);
  EXPECT_EQ(client.simple(100).payload, data);
}

TEST_F(Transmission, LeavingInTheMiddleOfAnythingHarmsNobody) {
  Client other = connect();
  other.enter("disk");
  const Bytes data = pattern(4096, 5);
  const Bytes all =
      join({other.request(kWrite, 1, 0, 4096), data, other.request(kRead, 2, 0, 4096)});
  for (size_t cut = 1; cut < all.size(); cut += 97) {
    Client client = connect();
    client.enter("disk");
    client.send(Bytes(all.begin(), all.begin() + static_cast<ptrdiff_t>(cut)));
    client.close();  // often with the reply unread
    EXPECT_EQ(other.read(8192, 512).size(), 512u);
  }
}

// Random requests, valid ones checked against an array, sent in random pieces.
TEST_F(Transmission, ARandomConversationMatchesAModel) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const auto below = [&](uint64_t n) { return random() % n; };
  Client client = connect();
  client.enter("disk");
  Bytes model(kSize);
  for (int round = 0; round < 60; ++round) {
    // Disjoint within a batch, because the order inside one is the server's.
    Bytes batch;
    std::map<uint64_t, std::pair<uint64_t, uint32_t>> reads;
    const uint64_t count = 1 + below(40);
    const uint64_t slot = kSize / count;
    for (uint64_t i = 0; i < count; ++i) {
      const auto length = static_cast<uint32_t>(1 + below(std::min<uint64_t>(slot, 100'000)));
      const uint64_t offset = i * slot + (below(3) == 0 ? 0 : below(slot - length + 1));
      const auto at = model.begin() + static_cast<ptrdiff_t>(offset);
      switch (below(3)) {
        case 0: {
          const Bytes data = pattern(length, static_cast<unsigned>(random()));
          batch = join({batch, client.request(kWrite, i, offset, length), data});
          std::copy(data.begin(), data.end(), at);
          break;
        }
        case 1:
          batch = join({batch, client.request(kZeroes, i, offset, length)});
          std::fill_n(at, length, std::byte{0});
          break;
        default:
          batch = join({batch, client.request(kRead, i, offset, length)});
          reads[i] = {offset, length};
      }
    }
    for (size_t sent = 0; sent < batch.size();) {
      const size_t n = std::min(batch.size() - sent, 1 + below(300'000));
      const auto at = batch.begin() + static_cast<ptrdiff_t>(sent);
      client.send(Bytes(at, at + static_cast<ptrdiff_t>(n)));
      sent += n;
    }
    for (uint64_t i = 0; i < count; ++i) {
      Bytes header = client.receive(16);
      uint64_t cookie = 0;
      for (size_t b = 8; b < 16; ++b) cookie = cookie << 8 | std::to_integer<uint64_t>(header[b]);
      EXPECT_EQ(join({Bytes(header.begin() + 4, header.begin() + 8)}), be32(0));
      const auto found = reads.find(cookie);
      if (found == reads.end()) continue;
      const auto [offset, length] = found->second;
      const Bytes got = client.receive(length);
      ASSERT_TRUE(
          std::equal(got.begin(), got.end(), model.begin() + static_cast<ptrdiff_t>(offset)));
    }
  }
}

TEST_F(Transmission, WithdrawingAnExportDisconnectsItsClientsOnly) {
  add("other", "driver=memory,size=1M");
  Client client = connect();
  Client bystander = connect();
  client.enter("disk");
  bystander.enter("other");
  on_fiber([&] { server_->remove_export("disk", soon()); });
  EXPECT_TRUE(client.closed());
  EXPECT_EQ(bystander.read(0, 512).size(), 512u);
  on_fiber(
      [&] { EXPECT_EQ(error_number([&] { server_->remove_export("disk", soon()); }), ENOENT); });
  Client late = connect();
  late.greet();
  EXPECT_EQ(late.final_of(7, join({be32(4), text("disk"), be16(0)})), kErrUnknown);
}

}  // namespace
}  // namespace minivmm::nbd
