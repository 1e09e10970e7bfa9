// SPDX-License-Identifier: Apache-2.0
// What the protocol's text says that a server does (MUST, SHOULD) with what a client gets wrong, a
// case each: the exact reply, or the end of the session. Beside each case another client works on.
// docs/nbd-conformance.md says which case is for which rule.
#pragma once

#include <string_view>

#include <functional>
#include <ostream>
#include <vector>

#include "fixture.h"

namespace minivmm::nbd::conformance {

inline constexpr uint16_t kRead = 0, kWrite = 1, kDisc = 2, kFlush = 3, kTrim = 4, kCache = 5,
                          kZeroes = 6, kStatus = 7;
inline constexpr uint16_t kFua = 1, kDf = 4, kReqOne = 8, kPayloadLen = 32;
inline constexpr uint32_t kPerm = 1, kInval = 22, kNoSpc = 28;
inline constexpr uint32_t kExportName = 1, kAbort = 2, kList = 3, kStartTls = 5, kInfo = 6, kGo = 7,
                          kStructured = 8, kListMeta = 9, kSetMeta = 10, kExtended = 11;
inline constexpr uint32_t kErrTlsReqd = 0x80000005;
using Numbers = std::initializer_list<uint16_t>;
inline constexpr uint64_t kSize = 1 << 20;
inline constexpr uint32_t kMost = 32 << 20;

inline Bytes named(std::string_view name) {
  return join({be32(static_cast<uint32_t>(name.size())), text(name)});
}
inline Bytes go(std::string_view name, const std::vector<uint16_t>& infos = {}) {
  Bytes out = join({named(name), be16(static_cast<uint16_t>(infos.size()))});
  for (const uint16_t each : infos) out = join({out, be16(each)});
  return out;
}
inline Bytes contexts(std::string_view name, std::initializer_list<std::string_view> list) {
  Bytes out = join({named(name), be32(static_cast<uint32_t>(list.size()))});
  for (const auto each : list) out = join({out, named(each)});
  return out;
}
inline uint64_t number(const Bytes& from, size_t at, size_t size) {
  Reply reply;
  reply.payload = from;
  return reply.number(at, size);
}

struct Case {
  const char* rule;
  std::function<void(Client&)> talk;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.rule; }
};

class Conformance : public ServerTest, public testing::WithParamInterface<Case> {
 protected:
  Conformance() : ServerTest({}, 1) {
    add("d", "driver=memory,size=1M", true, "a disk");
    add("ro", "driver=memory,size=1M", false);
    add("big", "driver=null,size=1T");
  }
  void check() {
    Client other = connect();
    other.enter("d");
    EXPECT_EQ(other.read(0, 512).size(), 512u);
    {
      Client client = connect();
      GetParam().talk(client);
    }
    EXPECT_EQ(other.read(4096, 512).size(), 512u) << "another client noticed";
  }
};

inline void closes_after(Client& c, const Bytes& said) {
  c.send(said);
  EXPECT_TRUE(c.closed());
}
}  // namespace minivmm::nbd::conformance
