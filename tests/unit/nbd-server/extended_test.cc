// SPDX-License-Identifier: Apache-2.0
// Extended headers: lengths of 64 bits, payloads that say so, and status by context.
#include <string>

#include <filesystem>
#include <fstream>

#include <gtest/gtest.h>

#include "fixture.h"

namespace minivmm::nbd {
namespace {

constexpr uint16_t kRead = 0, kWrite = 1, kTrim = 4, kCache = 5, kZeroes = 6, kStatus = 7;
constexpr uint16_t kPayloadLen = 32, kDf = 4, kReqOne = 8;
constexpr uint32_t kErrExtHeaderReqd = 0x8000000a;
constexpr uint64_t kHuge = uint64_t{1} << 42;
const std::string kBoth[] = {"base:allocation", "qemu:allocation-depth"};

class Extended : public ServerTest {
 protected:
  Extended() {
    add("d", "driver=memory,size=1M");
    add("huge", "driver=null,size=4T");
  }
};

TEST_F(Extended, AreNegotiatedAndTakePrecedenceOverStructuredReplies) {
  Client client = connect();
  client.greet();
  EXPECT_EQ(client.final_of(11, text("x")), kErrInvalid);
  EXPECT_EQ(client.final_of(8), kAck);
  EXPECT_EQ(client.final_of(11), kAck);
  EXPECT_EQ(client.final_of(11), kAck);
  EXPECT_EQ(client.final_of(8), kErrExtHeaderReqd);
  const auto answers = client.option(7, join({be32(1), text("d"), be16(0)}));
  EXPECT_EQ(answers.back().type, kAck);
  const Reply reply = client.ask(kRead, 0, 512);
  EXPECT_EQ(reply.type, 1);
}

TEST_F(Extended, ExportNameAfterThemEndsTheSession) {
  Client client = connect();
  client.greet();
  EXPECT_EQ(client.final_of(11), kAck);
  client.send_option(1, text("d"));
  EXPECT_TRUE(client.closed());
}

TEST_F(Extended, ContextsNeedNoStructuredRepliesBesideThem) {
  Client client = connect();
  EXPECT_EQ(client.enter_extended("d", {kBoth[0]}) & (1 << 12), 1 << 12);
}

TEST_F(Extended, EveryReplyIsAChunkThatNamesTheRequestsOffset) {
  Client client = connect();
  (void)client.enter_extended("d");
  const Bytes data(4096, std::byte{0x5a});
  EXPECT_EQ(client.ask(kWrite, 8192, 4096, kPayloadLen, data).type, 0);
  EXPECT_EQ(client.ask(3, 0, 0).type, 0);  // FLUSH
  const Reply read = client.ask(kRead, 8192, 4096);
  EXPECT_EQ(read.type, 1);
  EXPECT_EQ(read.number(0, 8), 8192u);
  EXPECT_EQ(Bytes(read.payload.begin() + 8, read.payload.end()), data);
  EXPECT_EQ(client.ask(kRead, 0, 0).type, 0);
  EXPECT_EQ(client.ask(kTrim, 8192, 4096).error, 0u);
  EXPECT_EQ(client.ask(kRead, 1 << 20, 1).error, 22u);
}

TEST_F(Extended, EffectsMayReachOver4GiB) {
  Client client = connect();
  (void)client.enter_extended("huge", {kBoth[0]});
  EXPECT_EQ(client.ask(kZeroes, 4096, kHuge - 4096).error, 0u);
  EXPECT_EQ(client.ask(kTrim, 0, kHuge).error, 0u);
  EXPECT_EQ(client.ask(kCache, 0, kHuge).error, 0u);
  const Reply status = client.ask(kStatus, 4096, kHuge - 4096);
  ASSERT_EQ(status.type, 6);
  EXPECT_EQ(status.number(0, 4), 1u);  // the context
  EXPECT_EQ(status.number(4, 4), 1u);  // one extent
  EXPECT_EQ(status.number(8, 8), kHuge - 4096);
  EXPECT_EQ(status.number(16, 8), 3u);
  // Past the end, and lengths that wrap around.
  EXPECT_EQ(client.ask(kZeroes, 4096, kHuge).error, 28u);
  EXPECT_EQ(client.ask(kTrim, kHuge - 1, UINT64_MAX).error, 22u);
  EXPECT_EQ(client.ask(kStatus, 512, UINT64_MAX - 511).error, 22u);
  EXPECT_EQ(client.ask(kRead, 0, uint64_t{1} << 32).error, 22u);
  EXPECT_EQ(client.ask(kRead, 0, 512).error, 0u);
}

TEST_F(Extended, OnlyTheFlagBringsAPayload) {
  Client client = connect();
  (void)client.enter_extended("d");
  EXPECT_EQ(client.ask(kWrite, 0, 512).error, 22u);  // nothing follows, and nothing is eaten
  const Bytes data(512, std::byte{7});
  for (const uint16_t type : {kRead, kTrim, kCache, kZeroes, uint16_t{3}, uint16_t{99}}) {
    EXPECT_EQ(client.ask(type, 0, 512, kPayloadLen, data).error, 22u) << type;
  }
  EXPECT_EQ(client.ask(kRead, 0, 512).error, 0u);
}

TEST_F(Extended, PayloadsBeyondTheLargestEndTheSession) {
  for (const uint16_t type : {kWrite, kStatus, kTrim}) {
    Client client = connect();
    (void)client.enter_extended("d", {kBoth[0]});
    client.send(client.long_request(type, 1, 0, (32u << 20) + 1, kPayloadLen));
    EXPECT_TRUE(client.closed()) << type;
  }
}

TEST_F(Extended, WithoutThemTheFlagIsUnknown) {
  Client client = connect();
  (void)client.enter("d", true, true);
  EXPECT_EQ(client.error_of(kStatus, 0, 512, kPayloadLen), 22u);
  EXPECT_EQ(client.error_of(kWrite, 0, 512, kPayloadLen, Bytes(512)), 22u);
  EXPECT_EQ(client.error_of(kRead, 0, 512), 0u);
}

TEST_F(Extended, AStatusQueryNamesItsContexts) {
  Client client = connect();
  (void)client.enter_extended("d", {kBoth[0], kBoth[1]});
  const auto ask = [&](uint64_t length, std::initializer_list<uint32_t> ids) {
    Bytes payload = be64(length);
    for (const uint32_t id : ids) payload = join({payload, be32(id)});
    return client.ask(kStatus, 4096, payload.size(), kPayloadLen, payload);
  };
  const Reply depth = ask(8192, {2});
  ASSERT_EQ(depth.type, 6);
  EXPECT_EQ(depth.number(0, 4), 2u);
  EXPECT_EQ(depth.number(8, 8), 8192u);
  EXPECT_EQ(ask(4096, {1}).number(0, 4), 1u);
  EXPECT_EQ(ask(4096, {}).type, 0);  // nothing was asked for
  EXPECT_EQ(ask(4096, {1, 1}).error, 22u);
  EXPECT_EQ(ask(4096, {3}).error, 22u);
  EXPECT_EQ(ask(4096, {0}).error, 22u);
  EXPECT_EQ(ask(4096, {0xffffffff}).error, 22u);
  EXPECT_EQ(ask(1 << 20, {1}).error, 22u);  // past the end
  EXPECT_EQ(ask(0, {1}).error, 22u);
  EXPECT_EQ(client.ask(kStatus, 0, 7, kPayloadLen, Bytes(7)).error, 22u);
  EXPECT_EQ(client.ask(kStatus, 0, 10, kPayloadLen, Bytes(10)).error, 22u);
  EXPECT_EQ(client.ask(kStatus, 0, 70000, kPayloadLen, Bytes(70000)).error, 22u);
  EXPECT_EQ(client.ask(kRead, 0, 512).error, 0u);
}

TEST_F(Extended, ContextsThatWereNotSelectedAreRefused) {
  Client client = connect();
  (void)client.enter_extended("d", {kBoth[0]});
  EXPECT_EQ(client.ask(kStatus, 0, 12, kPayloadLen, join({be64(512), be32(2)})).error, 22u);
  EXPECT_EQ(client.ask(kStatus, 0, 12, kPayloadLen, join({be64(512), be32(1)})).error, 0u);
}

TEST_F(Extended, OneExtentIsOneAndNoLongerThanAsked) {
  Client client = connect();
  (void)client.enter_extended("d", {kBoth[0]});
  const Bytes data(65536, std::byte{1});
  EXPECT_EQ(client.ask(kWrite, 65536, 65536, kPayloadLen, data).error, 0u);
  const Reply one = client.ask(kStatus, 0, 1 << 20, kReqOne);
  EXPECT_EQ(one.number(4, 4), 1u);
  EXPECT_EQ(one.payload.size(), 24u);
  EXPECT_EQ(client.ask(kStatus, 0, 512, kReqOne).number(8, 8), 512u);
}

TEST_F(Extended, HolesAndUnfragmentedReads) {
  const std::string path = testing::TempDir() + "nbd_extended.raw";
  std::ofstream(path).close();
  std::filesystem::resize_file(path, 1 << 20);
  add("holes", "driver=file,filename=" + path);
  Client client = connect();
  (void)client.enter_extended("holes");
  const Bytes data(65536, std::byte{1});
  EXPECT_EQ(client.ask(kWrite, 65536, 65536, kPayloadLen, data).error, 0u);
  client.send(client.long_request(kRead, 9, 0, 131072));
  Reply first = client.chunk();
  Reply second = client.chunk();
  EXPECT_EQ(first.type, 2);
  EXPECT_EQ(first.number(8, 4), 65536u);
  EXPECT_EQ(second.type, 1);
  EXPECT_EQ(second.number(0, 8), 65536u);
  EXPECT_EQ(second.offset, 0u);  // the request's
  const Reply whole = client.ask(kRead, 0, 131072, kDf);
  EXPECT_EQ(whole.type, 1);
  EXPECT_EQ(whole.payload.size(), 131072u + 8);
  std::filesystem::remove(path);
}

TEST_F(Extended, MessagesThatArriveInPiecesAreRequestsToo) {
  Client client = connect();
  (void)client.enter_extended("d", {kBoth[0]});
  const Bytes all = join({client.long_request(kWrite, 5, 0, 32, kPayloadLen), Bytes(32),
                          client.long_request(kStatus, 6, 0, 12, kPayloadLen), be64(512), be32(1),
                          client.long_request(kRead, 7, 0, 32)});
  for (const std::byte byte : all) client.send({byte});
  EXPECT_EQ(client.chunk().cookie, 5u);
  EXPECT_EQ(client.chunk().cookie, 6u);
  EXPECT_EQ(client.chunk().cookie, 7u);
}

}  // namespace
}  // namespace minivmm::nbd
