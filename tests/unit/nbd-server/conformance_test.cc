// SPDX-License-Identifier: Apache-2.0
// The rules of transmission, see conformance.h.
#include "conformance.h"

#include <sys/socket.h>

namespace minivmm::nbd {
namespace {

using namespace conformance;

TEST_P(Conformance, IsKept) { check(); }

// One request and its error; the session goes on.
void fails(Client& c, uint16_t type, uint64_t offset, uint32_t length, uint16_t flags,
           uint32_t expected, const Bytes& payload = {}) {
  EXPECT_EQ(c.error_of(type, offset, length, flags, payload), expected)
      << "type " << type << ", flags " << flags << ", offset " << offset << ", length " << length;
  EXPECT_EQ(c.error_of(kFlush, 0, 0), 0u) << "what follows was not understood";
}
// With simple and with structured replies.
std::function<void(Client&)> twice(const char* name, void (*talk)(Client&), bool structured) {
  return [=](Client& c) {
    c.enter(name, structured);
    talk(c);
  };
}

void unknown_commands(Client& c) {
  for (const uint16_t type : Numbers{8, 9, 255, 256, 32768, 65535})
    fails(c, type, 0, 512, 0, kInval);
}
void unknown_flags(Client& c) {
  for (const uint16_t type : {kRead, kWrite, kFlush, kTrim, kCache, kZeroes, kStatus}) {
    const uint32_t length = type == kFlush ? 0 : 512;
    const Bytes payload(type == kWrite ? 512 : 0);
    for (unsigned bit = 5; bit < 16; ++bit) {
      fails(c, type, 0, length, static_cast<uint16_t>(1u << bit), kInval, payload);
    }
  }
}
void flags_of_others(Client& c) {
  const Bytes payload(512);
  for (const uint16_t flag : Numbers{2, 8, 16}) fails(c, kRead, 0, 512, flag, kInval);
  for (const uint16_t flag : Numbers{2, 4, 8, 16}) fails(c, kWrite, 0, 512, flag, kInval, payload);
  for (const uint16_t flag : Numbers{2, 4, 8, 16}) fails(c, kTrim, 0, 512, flag, kInval);
  for (const uint16_t flag : Numbers{2, 4, 8, 16}) fails(c, kCache, 0, 512, flag, kInval);
  for (const uint16_t flag : Numbers{2, 4, 8, 16}) fails(c, kFlush, 0, 0, flag, kInval);
  for (const uint16_t flag : Numbers{4, 8}) fails(c, kZeroes, 0, 512, flag, kInval);
}
void fua_everywhere(Client& c) {
  fails(c, kWrite, 0, 512, kFua, 0, Bytes(512));
  for (const uint16_t type : {kTrim, kCache, kZeroes}) fails(c, type, 0, 512, kFua, 0);
  fails(c, kFlush, 0, 0, kFua, 0);
}
void nothing_at_all(Client& c) {
  for (const uint16_t type : {kRead, kWrite, kTrim, kCache, kZeroes}) fails(c, type, 0, 0, 0, 0);
  for (const uint16_t type : {kRead, kWrite, kTrim, kCache, kZeroes})
    fails(c, type, kSize, 0, 0, 0);
}
void past_the_end(Client& c) {
  const std::pair<uint64_t, uint32_t> ranges[] = {
      {kSize, 512}, {kSize - 1, 2}, {1ULL << 63, 512}, {~0ULL - 511, 512}, {~0ULL, 512}};
  for (const auto& [offset, length] : ranges) {
    fails(c, kRead, offset, length, 0, kInval);
    fails(c, kWrite, offset, length, 0, kNoSpc, Bytes(length));
    fails(c, kTrim, offset, length, 0, kInval);
    fails(c, kCache, offset, length, 0, kInval);
    fails(c, kZeroes, offset, length, 0, kNoSpc);
  }
}
void read_only(Client& c) {
  fails(c, kWrite, 0, 512, 0, kPerm, Bytes(512));
  fails(c, kTrim, 0, 512, 0, kPerm);
  fails(c, kZeroes, 0, 512, 0, kPerm);
}
void flush_with_range(Client& c) {
  fails(c, kFlush, 0, 512, 0, kInval);
  fails(c, kFlush, 512, 0, 0, kInval);
}
void more_than_the_maximum(Client& c) {
  fails(c, kRead, 0, kMost + 1, 0, kInval);
  fails(c, kRead, 0, 0xffffffff, 0, kInval);
  fails(c, kWrite, 0, kMost + 1, 0, kInval, Bytes(kMost + 1));
  // Without a payload there is no maximum.
  fails(c, kTrim, 0, 0xffffffff, 0, 0);
  fails(c, kZeroes, 0, 0xffffffff, 0, 0);
}
void same_cookie(Client& c) {
  c.send(join({c.request(kFlush, 77, 0, 0), c.request(kFlush, 77, 0, 0)}));
  for (int i = 0; i < 2; ++i) EXPECT_EQ(c.chunk().cookie, 77u);
}
void status_without_contexts(Client& c) { fails(c, kStatus, 0, 512, 0, kInval); }
void old_magics(Client& c) { closes_after(c, join({be32(0x12560953), Bytes(24)})); }
void reply_magic(Client& c) { closes_after(c, join({be32(0x67446698), Bytes(24)})); }
void extended_request(Client& c) { closes_after(c, c.long_request(kRead, 1, 0, 512)); }
void disconnect_with_rubbish(Client& c) {
  closes_after(c, join({c.request(kDisc, 5, 12345, 678), c.request(kRead, 6, 0, 512)}));
}
void disconnect_after_requests(Client& c) {
  c.send(
      join({c.request(kFlush, 1, 0, 0), c.request(kCache, 2, 0, 512), c.request(kDisc, 3, 0, 0)}));
  const uint64_t cookies = c.chunk().cookie | c.chunk().cookie << 8;
  EXPECT_TRUE(cookies == 0x0201 || cookies == 0x0102) << cookies;
  EXPECT_TRUE(c.closed());
}
void half_close(Client& c) {
  c.send(c.request(kFlush, 1, 0, 0));
  ::shutdown(c.fd(), SHUT_WR);
  EXPECT_EQ(c.chunk().cookie, 1u);
  EXPECT_TRUE(c.closed());
}
// Closing the other direction too: our replies meet a broken pipe, which is no signal here.
void broken_pipe(Client& c) {
  Bytes batch;
  for (uint64_t i = 0; i < 64; ++i) batch = join({batch, c.request(kRead, i, 0, 65536)});
  ::shutdown(c.fd(), SHUT_RD);
  c.send(batch);
  c.close();
}

struct Both {
  const char* rule;
  const char* name;
  void (*talk)(Client&);
};
constexpr Both kBoth[] = {
    {"unknown commands SHOULD be EINVAL, RESIZE among them", "d", unknown_commands},
    {"unknown flags SHOULD be EINVAL", "d", unknown_flags},
    {"flags of other commands SHOULD be EINVAL", "d", flags_of_others},
    {"FUA MUST be accepted on every command", "d", fua_everywhere},
    {"a length of nothing SHOULD NOT disconnect", "d", nothing_at_all},
    {"past the end: writes SHOULD be ENOSPC, others EINVAL", "d", past_the_end},
    {"changes of a read-only export MUST fail, SHOULD be EPERM", "ro", read_only},
    {"FLUSH with a range is EINVAL", "d", flush_with_range},
    {"beyond the maximum block size SHOULD be EINVAL", "big", more_than_the_maximum},
    {"every request gets its cookie back, though two have the same", "d", same_cookie},
    {"BLOCK_STATUS without contexts SHOULD be EINVAL", "d", status_without_contexts},
    {"a request without its magic ends the session", "d", old_magics},
    {"a reply is no request", "d", reply_magic},
    {"an extended request that was not negotiated ends the session", "d", extended_request},
    {"DISC ends the session, whatever is in it", "d", disconnect_with_rubbish},
    {"DISC: outstanding requests MUST be handled", "d", disconnect_after_requests},
    {"a half-closed client gets its replies", "d", half_close},
    {"a client that closed everything raises no signal", "d", broken_pipe},
};

std::vector<Case> transmission() {
  std::vector<Case> out;
  for (const Both& each : kBoth) {
    for (const bool structured : {false, true}) {
      out.push_back({each.rule, twice(each.name, each.talk, structured)});
    }
  }
  return out;
}
INSTANTIATE_TEST_SUITE_P(Transmission, Conformance, testing::ValuesIn(transmission()));

const Case kReplies[] = {
    {"without structured replies an error MUST bring no payload",
     [](Client& c) {
       c.enter("d");
       c.send(join({c.request(kRead, 1, kSize, 512), c.request(kFlush, 2, 0, 0)}));
       EXPECT_EQ(c.simple().error, kInval);
       EXPECT_EQ(c.simple().cookie, 2u);
     }},
    {"DF without structured replies is EINVAL",
     [](Client& c) {
       c.enter("d");
       EXPECT_EQ(c.error_of(kRead, 0, 512, kDf), kInval);
     }},
    {"with structured replies a READ MUST be answered by chunks, errors too",
     [](Client& c) {
       c.enter("d", true);
       for (const auto& [offset, flags] : {std::pair{kSize, 0}, std::pair{uint64_t{0}, 2}}) {
         c.send(c.request(kRead, 1, offset, 512, static_cast<uint16_t>(flags)));
         const Reply reply = c.chunk();
         EXPECT_TRUE(reply.structured);
         EXPECT_EQ(reply.type, 0x8001);
         EXPECT_EQ(reply.error, kInval);
         EXPECT_EQ(reply.number(4, 2), reply.payload.size() - 6);
       }
     }},
    {"DF MUST be one content chunk, at least up to 64 KiB",
     [](Client& c) {
       c.enter("d", true);
       EXPECT_EQ(c.error_of(kWrite, 0, 512, 0, Bytes(512, std::byte{1})), 0u);
       c.send(c.request(kRead, 1, 0, 65536, kDf));
       const Reply reply = c.chunk();
       EXPECT_EQ(reply.type, 1);
       EXPECT_EQ(reply.flags & 1, 1);
       EXPECT_EQ(reply.payload.size(), 8u + 65536);
     }},
    {"the DF flag MUST be offered with structured replies only",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(number(c.option(kInfo, go("d"))[0].data, 10, 2) & (1 << 7), 0u);
       EXPECT_EQ(c.final_of(kStructured), kAck);
       EXPECT_EQ(number(c.option(kInfo, go("d"))[0].data, 10, 2) & (1 << 7), 1u << 7);
     }},
    {"no context selected is none: BLOCK_STATUS SHOULD be EINVAL",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(c.final_of(kStructured), kAck);
       EXPECT_EQ(c.option(kSetMeta, contexts("d", {"base:allocation"})).size(), 2u);
       EXPECT_EQ(c.option(kSetMeta, contexts("d", {})).size(), 1u);
       EXPECT_EQ(c.final_of(kGo, go("d")), kAck);
       EXPECT_EQ(c.error_of(kStatus, 0, 512), kInval);
     }},
    {"BLOCK_STATUS past the end or of nothing is EINVAL",
     [](Client& c) {
       c.enter("d", true, true);
       EXPECT_EQ(c.error_of(kStatus, kSize, 512), kInval);
       EXPECT_EQ(c.error_of(kStatus, kSize - 511, 512), kInval);
       EXPECT_EQ(c.error_of(kStatus, ~0ULL, 2), kInval);
       EXPECT_EQ(c.error_of(kStatus, 0, 0), kInval);
     }},
    {"REQ_ONE MUST give one extent no longer than the request",
     [](Client& c) {
       c.enter("d", true, true);
       EXPECT_EQ(c.error_of(kWrite, 0, 65536, 0, Bytes(65536, std::byte{1})), 0u);
       c.send(c.request(kStatus, 1, 0, 4096, kReqOne));
       const Reply reply = c.chunk();
       EXPECT_EQ(reply.type, 5);
       ASSERT_EQ(reply.payload.size(), 12u);
       EXPECT_EQ(reply.number(4, 4), 4096u);
     }},
    {"extents MUST NOT be empty, all but the last MUST lie inside the request",
     [](Client& c) {
       c.enter("d", true, true);
       EXPECT_EQ(c.error_of(kWrite, 65536, 65536, 0, Bytes(65536, std::byte{1})), 0u);
       c.send(c.request(kStatus, 1, 0, 262144));
       const Reply reply = c.chunk();
       EXPECT_EQ(reply.type, 5);
       EXPECT_EQ(reply.payload.size() % 8, 4u);
       uint64_t sum = 0;
       for (size_t at = 4; at < reply.payload.size(); at += 8) {
         EXPECT_NE(reply.number(at, 4), 0u);
         EXPECT_LT(sum, 262144u);
         sum += reply.number(at, 4);
       }
     }},
    {"with extended headers only PAYLOAD_LEN brings a payload",
     [](Client& c) {
       c.enter_extended("d");
       EXPECT_EQ(c.ask(kWrite, 0, 512).error, kInval);
       EXPECT_EQ(c.ask(kWrite, 0, 512, kPayloadLen, Bytes(512)).error, 0u);
       EXPECT_EQ(c.ask(kRead, 0, 512, kPayloadLen, Bytes(512)).error, kInval);
       EXPECT_EQ(c.ask(kFlush, 0, 0).error, 0u);
     }},
    {"a compact request after extended headers ends the session",
     [](Client& c) {
       c.enter_extended("d");
       closes_after(c, join({c.request(kRead, 1, 0, 512), Bytes(4)}));
     }},
    {"lengths beyond 64 bits of disk are refused without a thought of memory",
     [](Client& c) {
       c.enter_extended("big");
       EXPECT_EQ(c.ask(kRead, 0, ~0ULL).error, kInval);
       EXPECT_EQ(c.ask(kZeroes, 4096, ~0ULL).error, kNoSpc);
       EXPECT_EQ(c.ask(kTrim, ~0ULL, ~0ULL).error, kInval);
       EXPECT_EQ(c.ask(kFlush, 0, 0).error, 0u);
     }},
};
INSTANTIATE_TEST_SUITE_P(Replies, Conformance, testing::ValuesIn(kReplies));

// A client that leaves inside any message, or closes its end for writing there.
TEST_F(ServerTest, LeavingInTheMiddleOfEveryMessageHarmsNobody) {
  add("d", "driver=memory,size=1M");
  Client other = connect();
  other.enter("d");
  Client maker = connect();  // only to put requests together
  const Bytes options =
      join({be32(3), be64(0x49484156454f5054), be32(kStructured), be32(0), be64(0x49484156454f5054),
            be32(kSetMeta), be32(28), contexts("d", {"base:allocation"}), be64(0x49484156454f5054),
            be32(kGo), be32(7), go("d")});
  const Bytes requests = join({maker.request(kWrite, 1, 0, 16), Bytes(16),
                               maker.request(kStatus, 2, 0, 512), maker.request(kRead, 3, 0, 512)});
  const Bytes whole = join({options, requests});
  for (size_t cut = 0; cut <= whole.size(); ++cut) {
    Client client = connect();
    client.send(Bytes(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(cut)));
    if (cut % 2 == 0) ::shutdown(client.fd(), SHUT_WR);
    if (cut % 16 == 0) {
      EXPECT_EQ(other.read(0, 512).size(), 512u) << cut;
    }
  }
}

}  // namespace
}  // namespace minivmm::nbd
