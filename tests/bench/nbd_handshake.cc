// SPDX-License-Identifier: Apache-2.0
#include "nbd_handshake.h"

#include <cerrno>
#include <cstdio>
#include <vector>

#include "base/error.h"
#include "nbd_socket.h"
#include "nbd_wire.h"

namespace minivmm::bench {
namespace {

constexpr std::uint32_t kMaxOption = 8192;

void append(std::vector<char>& out, const void* data, std::size_t size) {
  const char* p = static_cast<const char*>(data);
  out.insert(out.end(), p, p + size);
}
template <typename T>
void append_be(std::vector<char>& out, T value) {
  char raw[sizeof(T)];
  base::store_be<T>(raw, value);
  append(out, raw, sizeof raw);
}

void send_option(int fd, std::uint32_t option, const std::vector<char>& data) {
  std::vector<char> out;
  append_be<std::uint64_t>(out, kIHaveOpt);
  append_be<std::uint32_t>(out, option);
  append_be<std::uint32_t>(out, static_cast<std::uint32_t>(data.size()));
  append(out, data.data(), data.size());
  send_all(fd, out.data(), out.size());
}

struct OptionReply {
  std::uint32_t type = 0;
  std::vector<char> data;
};

OptionReply recv_option_reply(int fd) {
  char head[20];
  recv_all(fd, head, sizeof head);
  if (base::load_be<std::uint64_t>(head) != kOptReplyMagic) {
    throw base::Error(EPROTO, "the server's option reply has no magic");
  }
  OptionReply reply;
  reply.type = base::load_be<std::uint32_t>(head + 12);
  const auto length = base::load_be<std::uint32_t>(head + 16);
  if (length > kMaxOption) throw base::Error(EPROTO, "the server's option reply is too long");
  reply.data.resize(length);
  recv_all(fd, reply.data.data(), length);
  return reply;
}

bool ask_structured(int fd) {
  send_option(fd, kOptStructuredReply, {});
  return recv_option_reply(fd).type == kRepAck;
}

void send_option_reply(int fd, std::uint32_t option, std::uint32_t type,
                       const std::vector<char>& data) {
  std::vector<char> out;
  append_be<std::uint64_t>(out, kOptReplyMagic);
  append_be<std::uint32_t>(out, option);
  append_be<std::uint32_t>(out, type);
  append_be<std::uint32_t>(out, static_cast<std::uint32_t>(data.size()));
  append(out, data.data(), data.size());
  send_all(fd, out.data(), out.size());
}

void answer_go(int fd, const NbdExport& offered) {
  std::vector<char> info;
  append_be<std::uint16_t>(info, kInfoExport);
  append_be<std::uint64_t>(info, offered.size);
  append_be<std::uint16_t>(info, offered.flags);
  send_option_reply(fd, kOptGo, kRepInfo, info);
  send_option_reply(fd, kOptGo, kRepAck, {});
}

void answer_export_name(int fd, const NbdExport& offered, bool no_zeroes) {
  std::vector<char> out;
  append_be<std::uint64_t>(out, offered.size);
  append_be<std::uint16_t>(out, offered.flags);
  if (!no_zeroes) out.resize(out.size() + 124);
  send_all(fd, out.data(), out.size());
}

}  // namespace

NbdExport handshake_as_client(int fd, const std::string& name, bool structured) {
  char hello[18];
  recv_all(fd, hello, sizeof hello);
  if (base::load_be<std::uint64_t>(hello) != kNbdMagic ||
      base::load_be<std::uint64_t>(hello + 8) != kIHaveOpt) {
    throw base::Error(EPROTO, "this is no newstyle NBD server");
  }
  const auto flags = base::load_be<std::uint16_t>(hello + 16);
  char answer[4];
  base::store_be<std::uint32_t>(answer, flags & (kFlagFixedNewstyle | kFlagNoZeroes));
  send_all(fd, answer, sizeof answer);

  NbdExport result;
  if (structured && !(result.structured = ask_structured(fd))) {
    throw base::Error(ENOTSUP, "the server offers no structured replies");
  }
  std::vector<char> go;
  append_be<std::uint32_t>(go, static_cast<std::uint32_t>(name.size()));
  append(go, name.data(), name.size());
  append_be<std::uint16_t>(go, 0);
  send_option(fd, kOptGo, go);
  for (;;) {
    const OptionReply reply = recv_option_reply(fd);
    if (reply.type == kRepAck) break;
    if ((reply.type & kRepErrorBit) != 0) {
      throw base::Error(ENOENT, "the server refuses export '" + name +
                                    "': " + std::string(reply.data.begin(), reply.data.end()));
    }
    const bool about_export = reply.type == kRepInfo && reply.data.size() >= 12 &&
                              base::load_be<std::uint16_t>(reply.data.data()) == kInfoExport;
    if (!about_export) continue;
    result.size = base::load_be<std::uint64_t>(reply.data.data() + 2);
    result.flags = base::load_be<std::uint16_t>(reply.data.data() + 10);
  }
  if (result.size == 0) throw base::Error(EPROTO, "the export has no size");
  return result;
}

bool handshake_as_server(int fd, const NbdExport& offered) {
  char hello[18];
  base::store_be<std::uint64_t>(hello, kNbdMagic);
  base::store_be<std::uint64_t>(hello + 8, kIHaveOpt);
  base::store_be<std::uint16_t>(hello + 16, kFlagFixedNewstyle | kFlagNoZeroes);
  send_all(fd, hello, sizeof hello);
  char raw[4];
  recv_all(fd, raw, sizeof raw);
  const bool no_zeroes = (base::load_be<std::uint32_t>(raw) & kFlagNoZeroes) != 0;
  for (;;) {
    char head[16];
    recv_all(fd, head, sizeof head);
    const auto option = base::load_be<std::uint32_t>(head + 8);
    const auto length = base::load_be<std::uint32_t>(head + 12);
    if (base::load_be<std::uint64_t>(head) != kIHaveOpt || length > kMaxOption) {
      throw base::Error(EPROTO, "bad option from the client");
    }
    std::vector<char> data(length);
    recv_all(fd, data.data(), length);
    switch (option) {
      case kOptGo:
        answer_go(fd, offered);
        return true;
      case kOptExportName:
        answer_export_name(fd, offered, no_zeroes);
        return true;
      case kOptAbort:
        send_option_reply(fd, option, kRepAck, {});
        return false;
      default:
        send_option_reply(fd, option, kRepErrUnsup, {});
    }
  }
}

}  // namespace minivmm::bench
