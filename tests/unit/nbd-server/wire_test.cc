// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/wire.h"

#include <cerrno>
#include <cstring>

#include <gtest/gtest.h>

#include "base/error.h"
#include "client.h"
#include "nbd-server/option_data.h"
#include "nbd-server/uri.h"

namespace minivmm::nbd {
namespace {

using wire::decode_info_request;
using wire::decode_meta_context_request;

template <size_t N>
std::span<const std::byte, N> fixed(const Bytes& bytes) {
  EXPECT_EQ(bytes.size(), N);
  return std::span<const std::byte, N>(bytes.data(), N);
}

int reject_number(void (*body)(const Bytes&), const Bytes& data) {
  try {
    body(data);
  } catch (const base::Error& e) {
    return e.err();
  }
  return 0;
}
int reject_info(const Bytes& data) {
  return reject_number([](const Bytes& d) { (void)decode_info_request(d); }, data);
}
int reject_meta(const Bytes& data) {
  return reject_number([](const Bytes& d) { (void)decode_meta_context_request(d); }, data);
}

TEST(Wire, ARequestIsDecodedFieldByField) {
  const Bytes bytes = join({be32(0x25609513), be16(0x8001), be16(6), be64(0xfedcba9876543210),
                            be64(0x0102030405060708), be32(0xaabbccdd)});
  const auto request = wire::decode_request(bytes.data(), wire::Headers::kStructured);
  ASSERT_TRUE(request);
  EXPECT_EQ(request->flags, 0x8001);
  EXPECT_EQ(request->type, 6);
  EXPECT_EQ(request->cookie, 0xfedcba9876543210u);
  EXPECT_EQ(request->offset, 0x0102030405060708u);
  EXPECT_EQ(request->length, 0xaabbccddu);
  EXPECT_EQ(request->payload, 0u);
}

TEST(Wire, AnExtendedRequestHasALongLengthAndSaysWhetherDataFollow) {
  const auto decode = [](uint16_t flags, uint16_t type) {
    const Bytes bytes = join({be32(0x21e41c71), be16(flags), be16(type), be64(7),
                              be64(0x0102030405060708), be64(0x1122334455667788)});
    return *wire::decode_request(bytes.data(), wire::Headers::kExtended);
  };
  EXPECT_EQ(decode(0, 6).length, 0x1122334455667788u);
  EXPECT_EQ(decode(0, 6).payload, 0u);
  EXPECT_EQ(decode(32, 6).payload, 0x1122334455667788u);
  EXPECT_EQ(decode(0, 1).payload, 0u);  // only the flag counts
  EXPECT_EQ(decode(32, 1).payload, 0x1122334455667788u);
  EXPECT_EQ(decode(0, 1).cookie, 7u);
  EXPECT_EQ(decode(0, 1).offset, 0x0102030405060708u);
}

TEST(Wire, WrongMagicNumbersAreSeen) {
  // Off by one bit, and the magic of a reply.
  for (const uint32_t magic : {0x25609512u, 0x67446698u, 0u}) {
    EXPECT_FALSE(
        wire::decode_request(join({be32(magic), Bytes(24)}).data(), wire::Headers::kSimple));
  }
  // Each form has its own.
  EXPECT_FALSE(
      wire::decode_request(join({be32(0x25609513), Bytes(28)}).data(), wire::Headers::kExtended));
  EXPECT_FALSE(
      wire::decode_request(join({be32(0x21e41c71), Bytes(28)}).data(), wire::Headers::kStructured));
  EXPECT_FALSE(wire::decode_option_header(fixed<16>(join({be64(0x4e42444d41474943), Bytes(8)}))));
}

TEST(Wire, RepliesHaveTheLayoutOfTheSpecification) {
  std::array<std::byte, 64> out{};
  const auto written = [&out](size_t n) {
    return Bytes(out.begin(), out.begin() + static_cast<ptrdiff_t>(n));
  };
  wire::encode_simple_reply(out.data(), wire::ErrorCode::kNoSpc, 0x1122334455667788);
  EXPECT_EQ(written(16), join({be32(0x67446698), be32(28), be64(0x1122334455667788)}));
  const wire::Answered five{5, 8192, false};
  EXPECT_EQ(written(wire::encode_data_chunk(out.data(), five, 1, 4096, 512)),
            join({be32(0x668e33ef), be16(1), be16(1), be64(5), be32(520), be64(4096)}));
  EXPECT_EQ(written(wire::encode_hole_chunk(out.data(), five, 0, 4096, 512)),
            join({be32(0x668e33ef), be16(0), be16(2), be64(5), be32(12), be64(4096), be32(512)}));
  EXPECT_EQ(written(wire::encode_error_chunk(out.data(), five, 1, wire::ErrorCode::kIo, 7)),
            join({be32(0x668e33ef), be16(1), be16(0x8001), be64(5), be32(13), be32(5), be16(7)}));
  EXPECT_EQ(written(wire::encode_status_chunk(out.data(), five, 1, 1, 3)),
            join({be32(0x668e33ef), be16(1), be16(5), be64(5), be32(28), be32(1)}));
}

TEST(Wire, ExtendedRepliesHaveTheLayoutOfTheSpecification) {
  std::array<std::byte, 64> out{};
  const auto written = [&out](size_t n) {
    return Bytes(out.begin(), out.begin() + static_cast<ptrdiff_t>(n));
  };
  const auto head = [](uint16_t flags, uint16_t type, uint64_t length) {
    return join({be32(0x6e8a278c), be16(flags), be16(type), be64(5), be64(8192), be64(length)});
  };
  const wire::Answered five{5, 8192, true};
  EXPECT_EQ(written(wire::encode_chunk(out.data(), five, 1, wire::ChunkType::kNone, 0)),
            head(1, 0, 0));
  EXPECT_EQ(written(wire::encode_data_chunk(out.data(), five, 1, 8704, 512)),
            join({head(1, 1, 520), be64(8704)}));
  EXPECT_EQ(written(wire::encode_hole_chunk(out.data(), five, 0, 8704, 512)),
            join({head(0, 2, 12), be64(8704), be32(512)}));
  EXPECT_EQ(written(wire::encode_error_chunk(out.data(), five, 1, wire::ErrorCode::kIo, 7)),
            join({head(1, 0x8001, 13), be32(5), be16(7)}));
  EXPECT_EQ(written(wire::encode_status_chunk(out.data(), five, 1, 2, 3)),
            join({head(1, 6, 56), be32(2), be32(3)}));
  wire::encode_extent(out.data(), true, 0x1122334455667788, 3);
  EXPECT_EQ(written(16), join({be64(0x1122334455667788), be64(3)}));
}

TEST(Wire, ErrnoValuesBecomeThoseOfTheProtocol) {
  const std::pair<int, uint32_t> expected[] = {
      {EIO, 5},    {ENOSPC, 28}, {EDQUOT, 28}, {EFBIG, 28},      {EINVAL, 22},
      {EROFS, 1},  {EPERM, 1},   {ENOMEM, 12}, {EOPNOTSUPP, 95}, {ESTALE, 5},
      {EACCES, 1}, {0, 5},       {-7, 5},      {EOVERFLOW, 75},  {ESHUTDOWN, 108}};
  for (const auto& [err, code] : expected) {
    EXPECT_EQ(static_cast<uint32_t>(wire::error_code(err)), code) << err;
  }
}

TEST(OptionData, AnInfoRequestIsDecoded) {
  const Bytes data = join({be32(5), text("disk0"), be16(2), be16(3), be16(0xffff)});
  const auto request = decode_info_request(data);
  EXPECT_EQ(request.name, "disk0");
  EXPECT_TRUE(request.wants(3));
  EXPECT_TRUE(request.wants(0xffff));
  EXPECT_FALSE(request.wants(1));
}

TEST(OptionData, LengthsThatLieAreRejected) {
  EXPECT_EQ(reject_info({}), EINVAL);
  EXPECT_EQ(reject_info(be16(0)), EINVAL);
  EXPECT_EQ(reject_info(be32(0)), EINVAL);  // no count
  EXPECT_EQ(reject_info(join({be32(0xffffffff), text("x"), be16(0)})), EINVAL);
  EXPECT_EQ(reject_info(join({be32(2), text("x"), be16(0)})), EINVAL);  // eats the count
  EXPECT_EQ(reject_info(join({be32(1), text("x"), be16(1)})), EINVAL);  // one is missing
  EXPECT_EQ(reject_info(join({be32(1), text("x"), be16(0xffff)})), EINVAL);
  EXPECT_EQ(reject_info(join({be32(1), text("x"), be16(0), be16(0)})), EINVAL);  // one too many
  EXPECT_EQ(reject_info(join({be32(1), text("x"), be16(0), text("y")})), EINVAL);
  EXPECT_EQ(reject_info(join({be32(1), Bytes(1), be16(0)})), EINVAL);  // NUL in the name
  EXPECT_EQ(reject_info(join({be32(4097), Bytes(4097, std::byte{'a'}), be16(0)})), EINVAL);
  EXPECT_EQ(reject_info(join({be32(4096), Bytes(4096, std::byte{'a'}), be16(0)})), 0);

  EXPECT_EQ(reject_meta({}), EINVAL);
  EXPECT_EQ(reject_meta(join({be32(1), text("x")})), EINVAL);
  // A count that would make a huge table, with nothing behind it.
  EXPECT_EQ(reject_meta(join({be32(1), text("x"), be32(0xffffffff)})), EINVAL);
  EXPECT_EQ(reject_meta(join({be32(1), text("x"), be32(1), be32(5), text("base")})), EINVAL);
  EXPECT_EQ(reject_meta(join({be32(1), text("x"), be32(1), be32(0xfffffffc), text("base")})),
            EINVAL);
  EXPECT_EQ(reject_meta(join({be32(1), text("x"), be32(0), text("more")})), EINVAL);
  EXPECT_EQ(reject_meta(join({be32(1), text("x"), be32(2), be32(0), be32(0)})), 0);
}

TEST(Uris, AreReadAndPrinted) {
  // As written, and as printed (empty: the same).
  const std::pair<std::string, std::string> cases[] = {
      {"nbd://127.0.0.1", ""},
      {"nbd://127.0.0.1:10809", "nbd://127.0.0.1"},
      {"nbd://localhost:1234/disk0", ""},
      {"nbd://[::1]:0", ""},
      {"nbd://[::1]/a%20b", ""},
      {"nbd://", ""},
      {"nbd://:99", ""},
      {"nbd+unix:///?socket=m.sock", ""},
      {"nbd+unix://?socket=m.sock", "nbd+unix:///?socket=m.sock"},
      {"nbd+unix:///disk0?socket=/run/a%26b.sock", ""},
      {"nbd+unix:///x/y?socket=/run/m.sock", ""},
      {"nbds://host/d", ""},
      {"nbds://alice@host:5/d?tls-psk-file=/etc/psk", ""},
      {"nbds+unix://alice@/d?socket=/run/m.sock&tls-certificates=/etc/pki", ""},
      {"nbds://host/d?tls-hostname=other&tls-verify-peer=false", ""},
      {"nbds://host/d?tls-verify-peer=true", "nbds://host/d"},
      {"nbd+vsock://2:9999/d", ""},
      {"nbds+vsock://3:10809", "nbds+vsock://3"},
  };
  for (const auto& [given, printed] : cases) {
    EXPECT_EQ(parse_uri(given).text(), printed.empty() ? given : printed);
  }
  EXPECT_EQ(parse_uri("nbd+unix:///d%41?socket=/a%20b").socket_path, "/a b");
  EXPECT_EQ(parse_uri("nbd://[fe80::1]:5/x").host, "fe80::1");
  EXPECT_EQ(parse_uri("nbd://[fe80::1]:5/x").port, 5);
  EXPECT_EQ(parse_uri("nbd://h/x").export_name, "x");
}

TEST(Uris, WrongOnesAreRejectedWithTheirText) {
  for (const std::string text : {"",
                                 "nbd",
                                 "http://x",
                                 "nbd:unix:/x",
                                 "nbd://h:99999",
                                 "nbd://h:",
                                 "nbd://h:1x",
                                 "nbd://h:-1",
                                 "nbd://::1",
                                 "nbd://[::1",
                                 "nbd://[::1]x",
                                 "nbd://u@h",
                                 "nbd+vsock://",
                                 "nbd+vsock://x",
                                 "nbd+vsock://1:",
                                 "nbd+vsock://4294967296",
                                 "nbd://h?tls-psk-file=x",
                                 "nbd://h?tls-verify-peer=false",
                                 "nbds://h?tls-verify-peer=maybe",
                                 "nbds://h?socket=x",
                                 "nbd://h?tls=1",
                                 "nbd://h#f",
                                 "nbd+unix://",
                                 "nbd+unix:///x",
                                 "nbd+unix:///?socket=",
                                 "nbd+unix:///?foo=1",
                                 "nbd+unix://host/?socket=x",
                                 "nbd+unix:///?socket=x&y=1",
                                 "nbd+unix:///?socket=%",
                                 "nbd+unix:///?socket=%4",
                                 "nbd+unix:///?socket=%zz",
                                 "nbd+unix:///?socket=a%00b"}) {
    try {
      (void)parse_uri(text);
      ADD_FAILURE() << text;
    } catch (const base::Error& e) {
      EXPECT_EQ(e.err(), EINVAL);
      EXPECT_NE(std::string(e.what()).find("'" + text + "'"), std::string::npos) << e.what();
    }
  }
}

}  // namespace
}  // namespace minivmm::nbd
