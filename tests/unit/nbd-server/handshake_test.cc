// SPDX-License-Identifier: Apache-2.0
// What a server does with each option, right and wrong.
#include <algorithm>

#include "fixture.h"

namespace minivmm::nbd {
namespace {

constexpr uint32_t kExportName = 1, kAbort = 2, kList = 3, kStartTls = 5, kInfo = 6, kGo = 7,
                   kStructured = 8, kListMeta = 9, kSetMeta = 10;

Bytes named(std::string_view name) {
  return join({be32(static_cast<uint32_t>(name.size())), text(name)});
}
Bytes queries(std::string_view name, std::initializer_list<std::string_view> list) {
  Bytes out = join({named(name), be32(static_cast<uint32_t>(list.size()))});
  for (const auto query : list) out = join({out, named(query)});
  return out;
}

class Handshake : public ServerTest {
 protected:
  Handshake() {
    add("disk", "driver=memory,size=1M", true, "a disk");
    add("second", "driver=memory,size=2M", false);
  }
};

TEST_F(Handshake, ListsEveryExport) {
  Client client = connect();
  client.greet();
  const auto answers = client.option(kList);
  ASSERT_EQ(answers.size(), 3u);
  EXPECT_EQ(answers[0].data, join({named("disk"), text("a disk")}));
  EXPECT_EQ(answers[1].data, named("second"));
  EXPECT_EQ(answers[2].type, kAck);
  EXPECT_EQ(client.final_of(kList, text("x")), kErrInvalid);  // takes no data
}

TEST_F(Handshake, InfoTellsWhatIsAskedForAndGoOn) {
  Client client = connect();
  client.greet();
  const auto answers =
      client.option(kInfo, join({named("disk"), be16(4), be16(1), be16(2), be16(3), be16(77)}));
  ASSERT_EQ(answers.size(), 5u);
  // Writable: flush, FUA, trim, zeroes, several connections, cache, fast zeroes; no DF yet.
  EXPECT_EQ(answers[0].data, join({be16(0), be64(1 << 20), be16(0b1101'0110'1101)}));
  EXPECT_EQ(answers[1].data, join({be16(1), text("disk")}));
  EXPECT_EQ(answers[2].data, join({be16(2), text("a disk")}));
  EXPECT_EQ(answers[3].data, join({be16(3), be32(1), be32(4096), be32(32 << 20)}));
  EXPECT_EQ(answers[4].type, kAck);
  // The handshake goes on.
  EXPECT_EQ(client.final_of(kInfo, join({named("second"), be16(0)})), kAck);
}

TEST_F(Handshake, ReadOnlyExportsSaySoAndOfferNothingThatWrites) {
  Client client = connect();
  EXPECT_EQ(client.enter("second", true), 0b0101'1000'1111);  // with DF: replies are structured
}

TEST_F(Handshake, UnknownExportsAreNamedInTheAnswer) {
  Client client = connect();
  client.greet();
  for (const uint32_t opt : {kInfo, kGo}) {
    const auto answers = client.option(opt, join({named("nosuch"), be16(0)}));
    ASSERT_EQ(answers.size(), 1u);
    EXPECT_EQ(answers[0].type, kErrUnknown);
    EXPECT_NE(answers[0].text().find("'nosuch'"), std::string::npos);
  }
  // Two exports: the empty name is neither.
  EXPECT_EQ(client.final_of(kGo, join({named(""), be16(0)})), kErrUnknown);
  EXPECT_EQ(client.final_of(kGo, join({named("disk"), be16(0)})), kAck);
}

TEST_F(Handshake, TheEmptyNameIsTheOnlyExport) {
  on_fiber([&] { server_->remove_export("second", soon()); });
  Client client = connect();
  client.enter("");
  EXPECT_EQ(client.read(0, 512), Bytes(512));
}

TEST_F(Handshake, MalformedInfoIsInvalidAndTheHandshakeGoesOn) {
  Client client = connect();
  client.greet();
  for (const Bytes& data :
       {Bytes(), be32(0xffffffff), join({named("disk"), be16(3)}), join({be32(100), text("disk")}),
        join({named(std::string_view("di\0k", 4)), be16(0)})}) {
    const auto answers = client.option(kGo, data);
    EXPECT_EQ(answers.back().type, kErrInvalid);
    EXPECT_FALSE(answers.back().text().empty());
  }
  EXPECT_EQ(client.final_of(kGo, join({named("disk"), be16(0)})), kAck);
}

TEST_F(Handshake, UnknownOptionsAreUnsupportedAndTheirDataIsSkipped) {
  Client client = connect();
  client.greet();
  for (const uint32_t opt : {0u, 4u, kStartTls, 12345u, 0xffffffffu}) {
    EXPECT_EQ(client.final_of(opt, Bytes(100, std::byte{0x55})), kErrUnsup) << opt;
    // Also where there is more of it than any option needs.
    EXPECT_EQ(client.final_of(opt, Bytes(100'000, std::byte{0x55})), kErrUnsup) << opt;
  }
  EXPECT_EQ(client.final_of(kList), kAck);
}

TEST_F(Handshake, TooMuchDataIsSkippedAndRefusedAndFarTooMuchEndsIt) {
  Client client = connect();
  client.greet();
  EXPECT_EQ(client.final_of(kGo, Bytes(100'000)), kErrTooBig);
  EXPECT_EQ(client.final_of(kList), kAck);
  // Announced only: the server must not wait for, or make room for, four gigabytes.
  client.send(join({be64(0x49484156454f5054), be32(kGo), be32(0xffffffff)}));
  EXPECT_TRUE(client.closed());
}

TEST_F(Handshake, ExportNameEntersTransmission) {
  for (const bool no_zeroes : {false, true}) {
    Client client = connect();
    client.greet(no_zeroes ? 3 : 1);
    client.send_option(kExportName, text("disk"));
    const Bytes head = client.receive(10);
    EXPECT_EQ(head, join({be64(1 << 20), be16(0b1101'0110'1101)}));
    if (!no_zeroes) {
      EXPECT_EQ(client.receive(124), Bytes(124));
    }
    EXPECT_EQ(client.read(4096, 4096), Bytes(4096));
  }
}

TEST_F(Handshake, ExportNameOfNothingEndsTheSession) {
  for (const Bytes& name : {text("nosuch"), Bytes(5000, std::byte{'a'}), Bytes(3), text("")}) {
    Client client = connect();
    client.greet();
    client.send_option(kExportName, name);
    EXPECT_TRUE(client.closed());
  }
}

TEST_F(Handshake, AbortIsAcknowledged) {
  Client client = connect();
  client.greet();
  EXPECT_EQ(client.final_of(kAbort), kAck);
  EXPECT_TRUE(client.closed());
}

TEST_F(Handshake, BreakingTheProtocolEndsTheSession) {
  Client flags = connect();
  flags.greet(4);  // a flag that the server did not offer
  EXPECT_TRUE(flags.closed());
  Client magic = connect();
  magic.greet();
  magic.send(join({be64(0x49484156454f5055), be32(kList), be32(0)}));
  EXPECT_TRUE(magic.closed());
}

TEST_F(Handshake, StructuredRepliesTakeNoData) {
  Client client = connect();
  client.greet();
  EXPECT_EQ(client.final_of(kStructured, text("x")), kErrInvalid);
  EXPECT_EQ(client.final_of(kStructured), kAck);
  EXPECT_EQ(client.final_of(kStructured), kAck);
}

TEST_F(Handshake, ContextsNeedStructuredRepliesFirst) {
  Client client = connect();
  client.greet();
  EXPECT_EQ(client.final_of(kSetMeta, queries("disk", {"base:allocation"})), kErrInvalid);
  EXPECT_EQ(client.final_of(kListMeta, queries("disk", {})), kErrInvalid);
}

TEST_F(Handshake, ContextsAreListedByNamespaceAndSetByName) {
  Client client = connect();
  client.greet();
  client.option(kStructured);
  const auto listed = [&](std::initializer_list<std::string_view> q) {
    return client.option(kListMeta, queries("disk", q)).size() - 1;
  };
  EXPECT_EQ(listed({}), 2u);
  EXPECT_EQ(listed({"base:"}), 1u);
  EXPECT_EQ(listed({"base:allocation"}), 1u);
  EXPECT_EQ(listed({"base:allocation", "base:"}), 1u);
  EXPECT_EQ(listed({"base:alloc"}), 0u);
  EXPECT_EQ(listed({"qemu:"}), 1u);
  EXPECT_EQ(listed({"qemu:allocation-depth"}), 1u);
  EXPECT_EQ(listed({"qemu:nothing"}), 0u);
  EXPECT_EQ(listed({"", ":"}), 0u);
  const auto set = client.option(kSetMeta, queries("disk", {"x-y:z", "base:allocation"}));
  ASSERT_EQ(set.size(), 2u);
  EXPECT_EQ(set[0].data, join({be32(1), text("base:allocation")}));
  // A namespace is not a context.
  EXPECT_EQ(client.option(kSetMeta, queries("disk", {"base:"})).size(), 1u);
  EXPECT_EQ(client.final_of(kSetMeta, queries("nosuch", {"base:allocation"})), kErrUnknown);
  EXPECT_EQ(client.final_of(kListMeta, queries("nosuch", {})), kErrUnknown);
  EXPECT_EQ(client.final_of(kSetMeta, join({named("disk"), be32(7)})), kErrInvalid);
}

// Set for one export, used with another, or replaced by a failed SET: BLOCK_STATUS is an error.
TEST_F(Handshake, ContextsBelongToTheExportThatTheyWereSetFor) {
  const auto status_error = [this](auto prepare) {
    Client client = connect();
    client.greet();
    client.option(kStructured);
    client.option(kSetMeta, queries("disk", {"base:allocation"}));
    prepare(client);
    EXPECT_EQ(client.final_of(kGo, join({named("disk"), be16(0)})), kAck);
    return client.error_of(7, 0, 4096);
  };
  EXPECT_EQ(status_error([](Client&) {}), 0u);
  EXPECT_EQ(status_error([](Client& c) { c.option(kSetMeta, queries("disk", {})); }), 22u);
  EXPECT_EQ(status_error([](Client& c) { c.option(kSetMeta, be32(9)); }), 22u);
  EXPECT_EQ(status_error([](Client& c) { c.option(kSetMeta, Bytes(100'000)); }), 22u);
  EXPECT_EQ(
      status_error([](Client& c) { c.option(kSetMeta, queries("second", {"base:allocation"})); }),
      22u);
}

TEST_F(Handshake, LeavingAtAnyByteLeavesNothingBehind) {
  const Bytes whole =
      join({be32(3), be64(0x49484156454f5054), be32(kGo), be32(10), named("disk"), be16(0)});
  for (size_t cut = 0; cut <= whole.size(); ++cut) {
    Client client = connect();
    client.send(Bytes(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(cut)));
    client.close();
  }
  Client client = connect();
  client.enter("disk");
  EXPECT_EQ(client.read(0, 16), Bytes(16));
}

class ShortHandshake : public ServerTest {
 protected:
  ShortHandshake() : ServerTest({.handshake_limit = std::chrono::milliseconds(150)}) {
    add("disk", "driver=memory,size=1M");
  }
};

TEST_F(ShortHandshake, SilentAndSlowClientsAreCutOff) {
  Client silent = connect();
  Client slow = connect();
  slow.greet();
  slow.send(be64(0x49484156454f5054));
  silent.receive(18);
  EXPECT_TRUE(silent.closed());
  EXPECT_TRUE(slow.closed());
  // One that came through in time is not affected by the limit.
  Client quick = connect();
  quick.enter("disk");
  ::usleep(300'000);
  EXPECT_EQ(quick.read(0, 16), Bytes(16));
}

}  // namespace
}  // namespace minivmm::nbd
