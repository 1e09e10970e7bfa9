// SPDX-License-Identifier: Apache-2.0
// The handshake's rules, see conformance.h.
#include <string>

#include <algorithm>
#include <memory>
#include <vector>

#include "block/filters/filter_node.h"
#include "block/graph/dirty_bitmaps.h"
#include "conformance.h"

namespace minivmm::nbd {
namespace {

using namespace conformance;

class HandshakeConformance : public Conformance {};
TEST_P(HandshakeConformance, IsKept) { check(); }

// And haggling goes on.
void answers(Client& c, uint32_t option, const Bytes& data, uint32_t expected) {
  EXPECT_EQ(c.final_of(option, data), expected);
  EXPECT_EQ(c.final_of(kInfo, go("d")), kAck);
}

const Case kHandshake[] = {
    {"the server MUST set FIXED_NEWSTYLE and NO_ZEROES and no other handshake flags",
     [](Client& c) {
       EXPECT_EQ(c.receive(18), join({text("NBDMAGICIHAVEOPT"), be16(3)}));
       c.send(be32(3));
       EXPECT_EQ(c.final_of(kList), kAck);
     }},
    {"NO_ZEROES without fixed newstyle leaves the padding out, too",
     [](Client& c) {
       c.greet(2);
       c.send_option(kExportName, text("d"));
       EXPECT_EQ(number(c.receive(10), 0, 8), kSize);
       EXPECT_EQ(c.read(0, 16).size(), 16u);
     }},
    {"transmission flags: bit 0 MUST be set, what is not offered MUST NOT",
     [](Client& c) {
       c.greet();
       const auto flags = [&](const char* name) {
         return number(c.option(kInfo, go(name))[0].data, 10, 2);
       };
       // FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, CACHE, FAST_ZERO.
       EXPECT_EQ(flags("d"), 0x0d6du);
       EXPECT_EQ(flags("ro"), 0x050fu);
     }},
    {"LIST MUST give a SERVER each, with name and description, and ACK without data",
     [](Client& c) {
       c.greet();
       const auto all = c.option(kList);
       ASSERT_EQ(all.size(), 4u);
       for (const OptionAnswer& each : all) {
         EXPECT_EQ(each.option, kList);
         if (each.type == 2 && each.data[3] == std::byte{1}) {
           EXPECT_EQ(each.data, join({named("d"), text("a disk")}));
         }
       }
       EXPECT_TRUE(all.back().data.empty());
     }},
    {"error texts MUST be UTF-8 and SHOULD be short, whatever the name was",
     [](Client& c) {
       c.greet();
       for (const std::string& name :
            {std::string("\xff\xfe"), std::string(4096, 'n'), std::string(300, '\x80')}) {
         const std::string said = c.option(kGo, go(name)).at(0).text();
         EXPECT_LE(said.size(), 300u);
         for (const char each : said) EXPECT_TRUE(each >= ' ' && each <= '~') << said;
       }
     }},
    {"PEEK_EXPORT and EXPORT_NAME apart, an option is answered with its own number",
     [](Client& c) {
       c.greet();
       for (const uint32_t option : {4u, kInfo, kListMeta, 12u, 0xffffffffu}) {
         for (const OptionAnswer& each : c.option(option, Bytes(3))) {
           EXPECT_EQ(each.option, option);
         }
       }
     }},
    {"STRUCTURED_REPLY twice MAY be acknowledged, after EXTENDED_HEADERS it is EXT_HEADER_REQD",
     [](Client& c) {
       c.greet();
       answers(c, kStructured, {}, kAck);
       answers(c, kStructured, {}, kAck);
       answers(c, kExtended, {}, kAck);
       answers(c, kStructured, {}, 0x8000000a);
       answers(c, kExtended, {}, kAck);
     }},
    {"a refused GO MUST leave the handshake as it was",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(c.final_of(kStructured), kAck);
       EXPECT_EQ(c.final_of(kSetMeta, contexts("d", {"base:allocation"})), kAck);
       EXPECT_EQ(c.final_of(kGo, go("nosuch")), kErrUnknown);
       EXPECT_EQ(c.final_of(kGo, go("d")), kAck);
       EXPECT_EQ(c.error_of(kStatus, 0, 512), 0u);
     }},
    {"unknown client flags MUST end the session",
     [](Client& c) {
       c.greet(1u << 2 | 1);
       EXPECT_TRUE(c.closed());
     }},
    {"also the highest of them",
     [](Client& c) {
       c.greet(1u << 31);
       EXPECT_TRUE(c.closed());
     }},
    {"EXPORT_NAME is valid without fixed newstyle, and padded",
     [](Client& c) {
       c.greet(0);
       c.send_option(kExportName, text("d"));
       EXPECT_EQ(number(c.receive(134), 0, 8), kSize);
       EXPECT_EQ(c.read(0, 16).size(), 16u);
     }},
    {"NO_ZEROES MUST leave the padding out",
     [](Client& c) {
       c.greet(3);
       c.send_option(kExportName, text("d"));
       EXPECT_EQ(number(c.receive(10), 0, 8), kSize);
       EXPECT_EQ(c.read(0, 16).size(), 16u);
     }},
    {"GO MUST NOT be padded, with or without NO_ZEROES",
     [](Client& c) {
       c.greet(1);
       EXPECT_EQ(c.final_of(kGo, go("d")), kAck);
       EXPECT_EQ(c.read(0, 16).size(), 16u);
     }},
    {"EXPORT_NAME of an unknown export MUST end the session",
     [](Client& c) {
       c.greet();
       c.send_option(kExportName, text("nosuch"));
       EXPECT_TRUE(c.closed());
     }},
    {"an option without its magic ends the session",
     [](Client& c) {
       c.greet();
       closes_after(c, join({be64(0x49484156454f5053), be32(kList), be32(0)}));
     }},
    {"ABORT MUST be acknowledged, data with it SHOULD be ignored",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(c.final_of(kAbort, text("bye")), kAck);
       EXPECT_TRUE(c.closed());
     }},
    {"a client that leaves right after ABORT SHOULD be no trouble",
     [](Client& c) {
       c.greet();
       c.send_option(kAbort, {});
       c.close();
     }},
    {"LIST with data SHOULD be INVALID",
     [](Client& c) {
       c.greet();
       answers(c, kList, text("x"), kErrInvalid);
     }},
    {"PEEK_EXPORT, which was withdrawn, is unknown",
     [](Client& c) {
       c.greet();
       answers(c, 4, text("d"), kErrUnsup);
     }},
    {"an unknown option is UNSUP and its data are skipped",
     [](Client& c) {
       c.greet();
       answers(c, 0xfffffffe, Bytes(70'000, std::byte{0x49}), kErrUnsup);
     }},
    {"STARTTLS without TLS to give MUST be UNSUP or POLICY",
     [](Client& c) {
       c.greet();
       answers(c, kStartTls, {}, kErrUnsup);
     }},
    {"without TLS nothing MUST be answered TLS_REQD",
     [](Client& c) {
       c.greet();
       for (uint32_t option = 2; option < 16; ++option) {
         if (option == kAbort || option == kGo) continue;
         EXPECT_NE(c.final_of(option, contexts("nosuch", {})), kErrTlsReqd) << option;
       }
     }},
    {"a GO whose name is longer than its data is INVALID",
     [](Client& c) {
       c.greet();
       answers(c, kGo, join({be32(5), text("d"), be16(0)}), kErrInvalid);
     }},
    {"a GO whose name has 4 GiB is INVALID",
     [](Client& c) {
       c.greet();
       answers(c, kGo, join({be32(0xffffffff), text("d"), be16(0)}), kErrInvalid);
     }},
    {"a GO with bytes behind its end is INVALID",
     [](Client& c) {
       c.greet();
       answers(c, kGo, join({go("d"), be16(0)}), kErrInvalid);
     }},
    {"a GO that announces more infos than it has is INVALID",
     [](Client& c) {
       c.greet();
       answers(c, kGo, join({named("d"), be16(2), be16(3)}), kErrInvalid);
     }},
    {"a name MUST NOT contain NUL",
     [](Client& c) {
       c.greet();
       answers(c, kGo, go(std::string_view("d\0", 2)), kErrInvalid);
     }},
    {"a name MUST be no longer than 4096 bytes",
     [](Client& c) {
       c.greet();
       answers(c, kGo, go(std::string(4096, 'n')), kErrUnknown);
       answers(c, kGo, go(std::string(4097, 'n')), kErrInvalid);
     }},
    {"an unknown export is UNKNOWN, without INFO",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(c.option(kGo, go("nosuch", {0, 1, 2, 3})).size(), 1u);
       answers(c, kInfo, go("nosuch"), kErrUnknown);
     }},
    {"unknown infos MUST be ignored, INFO_EXPORT MUST come, and each once",
     [](Client& c) {
       c.greet();
       const auto all = c.option(kInfo, go("d", {3, 99, 3, 0, 65535}));
       ASSERT_EQ(all.size(), 3u);
       EXPECT_EQ(all[0].data.size(), 12u);
       EXPECT_EQ(all[1].data.size(), 14u);
     }},
    {"INFO and GO with the same parameters MUST tell the same",
     [](Client& c) {
       c.greet();
       const auto first = c.option(kInfo, go("d", {1, 2, 3}));
       const auto second = c.option(kGo, go("d", {1, 2, 3}));
       ASSERT_EQ(first.size(), second.size());
       for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(first[i].data == second[i].data);
     }},
    {"block sizes MUST be powers of two, the maximum a multiple of the minimum",
     [](Client& c) {
       c.greet();
       const Bytes sizes = c.option(kInfo, go("d", {3})).at(1).data;
       const uint64_t least = number(sizes, 2, 4), best = number(sizes, 6, 4),
                      most = number(sizes, 10, 4);
       EXPECT_TRUE(least != 0 && least <= 65536 && (least & (least - 1)) == 0) << least;
       EXPECT_TRUE(best >= std::max<uint64_t>(512, least) && (best & (best - 1)) == 0) << best;
       EXPECT_EQ(most % least, 0u);
       EXPECT_GE(most, kSize);
     }},
    {"STRUCTURED_REPLY with data SHOULD be INVALID",
     [](Client& c) {
       c.greet();
       answers(c, kStructured, text("x"), kErrInvalid);
     }},
    {"EXTENDED_HEADERS with data SHOULD be INVALID",
     [](Client& c) {
       c.greet();
       answers(c, kExtended, text("x"), kErrInvalid);
     }},
    {"contexts before structured replies are INVALID",
     [](Client& c) {
       c.greet();
       answers(c, kListMeta, contexts("d", {}), kErrInvalid);
       answers(c, kSetMeta, contexts("d", {"base:allocation"}), kErrInvalid);
     }},
    {"queries whose lengths lie MUST be INVALID",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(c.final_of(kStructured), kAck);
       for (const uint32_t option : {kListMeta, kSetMeta}) {
         answers(c, option, join({named("d"), be32(1)}), kErrInvalid);
         answers(c, option, join({named("d"), be32(1), be32(9), text("base:")}), kErrInvalid);
         answers(c, option, join({named("d"), be32(0xffffffff), named("base:")}), kErrInvalid);
         answers(c, option, join({contexts("d", {"base:"}), be16(0)}), kErrInvalid);
         answers(c, option, named("d"), kErrInvalid);
       }
     }},
    {"queries of unknown namespaces MUST be ignored",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(c.final_of(kStructured), kAck);
       for (const uint32_t option : {kListMeta, kSetMeta}) {
         const auto all = c.option(option, contexts("d", {"x-foo:", "nosuch:a", "base:nosuch"}));
         ASSERT_EQ(all.size(), 1u);
         EXPECT_EQ(all[0].type, kAck);
       }
     }},
    {"no query MUST list every context, with an id of zero",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(c.final_of(kStructured), kAck);
       const auto all = c.option(kListMeta, contexts("d", {}));
       ASSERT_GE(all.size(), 2u);
       EXPECT_EQ(all[0].data, join({be32(0), text("base:allocation")}));
     }},
    {"base: MUST be a wildcard for LIST and MUST be ignored by SET",
     [](Client& c) {
       c.greet();
       EXPECT_EQ(c.final_of(kStructured), kAck);
       EXPECT_EQ(c.option(kListMeta, contexts("d", {"base:"})).size(), 2u);
       EXPECT_EQ(c.option(kSetMeta, contexts("d", {"base:"})).size(), 1u);
     }},
    {"an option longer than the server bears is skipped, or ends the session",
     [](Client& c) {
       c.greet();
       answers(c, kInfo, Bytes(40'000), kErrTooBig);
       closes_after(c, join({be64(0x49484156454f5054), be32(kInfo), be32(0x80000000)}));
     }},
};

class ManyBitmaps final : public block::DirtyBitmaps {
 public:
  std::vector<Info> list() const override {
    std::vector<Info> out;
    for (int i = 0; i < 40; ++i) out.push_back({"b" + std::to_string(i), 512, true, false});
    return out;
  }
  Status status(std::string_view, uint64_t, uint64_t length) override { return {length, false}; }
  void add(std::string_view, uint64_t, bool) override {}
  void remove(std::string_view) override {}
  void clear(std::string_view) override {}
  void set_enabled(std::string_view, bool) override {}
  void merge(std::string_view, DirtyBitmaps&, std::string_view) override {}
};

class BitmapNode final : public block::FilterNode {
 public:
  explicit BitmapNode(std::shared_ptr<block::Node> file)
      : FilterNode({"many", false}, "bitmaps", std::move(file)) {}
  block::DirtyBitmaps* dirty_bitmaps() noexcept override { return &bitmaps_; }

 private:
  ManyBitmaps bitmaps_;
};

// "MAY return TOO_BIG if a request seeks to select too many contexts"; a list has them all, and
// what was selected before is gone.
TEST_F(ServerTest, MoreContextsThanCanBeSelectedAreRefusedTogether) {
  on_fiber([&] {
    graph_.adopt(std::make_shared<BitmapNode>(
        graph_.add(block::Options::from_keys("driver=memory,size=1M,node-name=file"))));
    server_->add_export("m",
                        graph_.attach("many", "NBD export", block::Permissions::front_end(false)),
                        {.description = "", .writable = false});
  });
  const auto select = [](unsigned bitmaps) {
    Bytes out = join({named("m"), be32(bitmaps)});
    for (unsigned i = 0; i < bitmaps; ++i) {
      out = join({out, named("qemu:dirty-bitmap:b" + std::to_string(i))});
    }
    return out;
  };
  Client client = connect();
  client.greet();
  EXPECT_EQ(client.final_of(kStructured), kAck);
  EXPECT_EQ(client.option(kListMeta, contexts("m", {})).size(), 43u);
  EXPECT_EQ(client.option(kSetMeta, select(32)).size(), 33u);
  EXPECT_EQ(client.option(kSetMeta, select(33)).size(), 1u);
  EXPECT_EQ(client.final_of(kSetMeta, select(33)), kErrTooBig);
  EXPECT_EQ(client.final_of(kGo, go("m")), kAck);
  EXPECT_EQ(client.error_of(kStatus, 0, 512), kInval);
}

INSTANTIATE_TEST_SUITE_P(All, HandshakeConformance, testing::ValuesIn(kHandshake));

}  // namespace
}  // namespace minivmm::nbd
