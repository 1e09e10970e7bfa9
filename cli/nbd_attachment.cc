// SPDX-License-Identifier: Apache-2.0
#include "cli/nbd_attachment.h"

#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <fmt/core.h>
#include <netdb.h>

#include "base/bytes.h"
#include "base/error.h"
#include "cli/nbd_channel.h"
#include "nbd-server/wire.h"

namespace minivmm::cli {
namespace {

using base::Error;
using base::NbdUri;
using base::UniqueFd;
namespace wire = nbd::wire;
using Credentials = std::shared_ptr<const nbd::TlsCredentials>;

constexpr uint32_t kMaxAnswer = 64 << 10;

void set_limit(int fd, std::chrono::seconds limit) {
  const timeval time{.tv_sec = static_cast<time_t>(limit.count()), .tv_usec = 0};
  (void)::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
  (void)::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
}

UniqueFd connect_to(const sockaddr* address, socklen_t length, std::chrono::seconds limit) {
  UniqueFd fd(::socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) return fd;
  set_limit(fd.get(), limit);
  if (::connect(fd.get(), address, length) != 0) {
    const int err = errno;
    fd.reset();
    errno = err;
  }
  return fd;
}

UniqueFd connect_tcp(const NbdUri& uri, std::chrono::seconds limit) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const std::string host = uri.host.empty() ? "localhost" : uri.host;
  const int failed = ::getaddrinfo(host.c_str(), std::to_string(uri.port).c_str(), &hints, &found);
  if (failed != 0) throw Error(EHOSTUNREACH, fmt::format("{}: {}", host, ::gai_strerror(failed)));
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> list(found, &::freeaddrinfo);
  UniqueFd out;
  for (const addrinfo* each = found; each != nullptr && !out; each = each->ai_next) {
    out = connect_to(each->ai_addr, each->ai_addrlen, limit);
  }
  if (!out) return out;
  const int one = 1;
  (void)::setsockopt(out.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  // A server whose host died is noticed in the end.
  (void)::setsockopt(out.get(), SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
  return out;
}

UniqueFd connect(const NbdUri& uri, std::chrono::seconds limit) {
  UniqueFd out;
  if (uri.is_unix()) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (uri.socket_path.size() >= sizeof address.sun_path) {
      throw Error(ENAMETOOLONG, fmt::format("{}: too long for a unix socket", uri.socket_path));
    }
    std::memcpy(address.sun_path, uri.socket_path.data(), uri.socket_path.size());
    out = connect_to(reinterpret_cast<const sockaddr*>(&address), sizeof address, limit);
  } else if (uri.is_vsock()) {
    sockaddr_vm address{};
    address.svm_family = AF_VSOCK;
    address.svm_cid = *uri.vsock_cid;
    address.svm_port = uri.vsock_port;
    out = connect_to(reinterpret_cast<const sockaddr*>(&address), sizeof address, limit);
  } else {
    out = connect_tcp(uri, limit);
  }
  if (!out) throw base::errno_error(errno, fmt::format("{}: cannot connect", uri.text()));
  return out;
}

// The handshake, step by step.
class Handshake {
 public:
  Handshake(NbdChannel& channel, const NbdUri& uri) : channel_(channel), uri_(uri) {}

  void run(NbdAttachment& out, const Credentials& credentials) {
    greet();
    if (credentials) start_tls(credentials);
    ask(wire::Option::kGo);
    while (!take_answer(out)) {
    }
  }

 private:
  [[noreturn]] void fail(int err, const std::string& why) const { channel_.fail(err, why); }

  void receive(std::span<std::byte> to) { channel_.receive(to); }
  void send(const std::vector<std::byte>& bytes) { channel_.send(bytes); }

  template <typename T>
  T number() {
    std::array<std::byte, sizeof(T)> bytes;
    receive(bytes);
    return base::load_be<T>(bytes.data());
  }
  template <typename T>
  static void put(std::vector<std::byte>& to, T value) {
    to.resize(to.size() + sizeof value);
    base::store_be(to.data() + to.size() - sizeof value, value);
  }

  void greet() {
    const auto hello = wire::encode_hello();
    std::vector<std::byte> got(hello.size());
    receive(got);
    // The last two bytes are the server's flags.
    if (std::memcmp(got.data(), hello.data(), hello.size() - 2) != 0) {
      fail(EPROTO, "not an NBD server of the newstyle");
    }
    const auto flags = base::load_be<uint16_t>(got.data() + got.size() - 2);
    if ((flags & wire::kFixedNewstyle) == 0)
      fail(EPROTO, "the server does not know the fixed handshake");
    no_zeroes_ = (flags & wire::kNoZeroes) != 0;
    std::vector<std::byte> ours;
    put(ours, static_cast<uint32_t>(flags & wire::kKnownClientFlags));
    send(ours);
  }

  void ask(wire::Option option) {
    const std::string& name = uri_.export_name;
    std::vector<std::byte> data;
    const auto text = std::as_bytes(std::span(name));
    if (option == wire::Option::kGo) {
      put(data, static_cast<uint32_t>(name.size()));
      data.insert(data.end(), text.begin(), text.end());
      put(data, uint16_t{1});
      put(data, static_cast<uint16_t>(wire::Info::kBlockSize));
    } else if (option == wire::Option::kExportName) {
      data.assign(text.begin(), text.end());
    }
    std::vector<std::byte> message;
    put(message, wire::kOptionMagic);
    put(message, static_cast<uint32_t>(option));
    put(message, static_cast<uint32_t>(data.size()));
    message.insert(message.end(), data.begin(), data.end());
    send(message);
  }

  struct Answer {
    uint32_t type = 0;
    std::vector<std::byte> data;
  };
  Answer answer() {
    if (number<uint64_t>() != wire::kOptionReplyMagic)
      fail(EPROTO, "an answer that makes no sense");
    (void)number<uint32_t>();
    Answer out;
    out.type = number<uint32_t>();
    const auto length = number<uint32_t>();
    if (length > kMaxAnswer) fail(EPROTO, "an answer that is far too long");
    out.data.resize(length);
    receive(out.data);
    return out;
  }

  void start_tls(const Credentials& credentials) {
    ask(wire::Option::kStartTls);
    if (answer().type != static_cast<uint32_t>(wire::OptionReply::kAck)) {
      fail(ENOTSUP, "the server does no TLS");
    }
    channel_.start_tls(credentials);
  }

  // True at the end of the handshake.
  bool take_answer(NbdAttachment& out) {
    const auto [type, data] = answer();
    if (type == static_cast<uint32_t>(wire::OptionReply::kAck)) return true;
    if (type == static_cast<uint32_t>(wire::OptionReply::kInfo)) {
      take_info(data, out);
      return false;
    }
    if (type == static_cast<uint32_t>(wire::OptionReply::kErrUnsup)) {
      export_name(out);
      return true;
    }
    if (type == static_cast<uint32_t>(wire::OptionReply::kErrTlsReqd)) {
      fail(ENOTSUP, "the server wants TLS: nbds in the URI, or --tls-creds");
    }
    const std::string words(reinterpret_cast<const char*>(data.data()), data.size());
    fail(ENOENT, words.empty() ? "the server refuses" : "the server says: " + words);
  }

  static void take_info(const std::vector<std::byte>& data, NbdAttachment& out) {
    if (data.size() < 2) return;
    const auto type = base::load_be<uint16_t>(data.data());
    if (type == static_cast<uint16_t>(wire::Info::kExport) && data.size() >= 12) {
      out.size = base::load_be<uint64_t>(data.data() + 2);
      out.flags = base::load_be<uint16_t>(data.data() + 10);
    } else if (type == static_cast<uint16_t>(wire::Info::kBlockSize) && data.size() >= 14) {
      out.minimum_block = base::load_be<uint32_t>(data.data() + 2);
    }
  }

  // Of servers that know no GO.
  void export_name(NbdAttachment& out) {
    ask(wire::Option::kExportName);
    out.size = number<uint64_t>();
    out.flags = number<uint16_t>();
    std::array<std::byte, 124> zeroes;
    if (!no_zeroes_) receive(zeroes);
  }

  NbdChannel& channel_;
  const NbdUri& uri_;
  bool no_zeroes_ = false;
};

NbdAttachment shake_hands(UniqueFd connected, const NbdUri& uri, std::chrono::seconds limit,
                          const Credentials& credentials) {
  NbdAttachment out;
  out.socket = std::move(connected);
  NbdChannel channel(out.socket.get(), uri.text(), limit);
  Handshake(channel, uri).run(out, credentials);
  out.tls = channel.take_tls();
  set_limit(out.socket.get(), std::chrono::seconds(0));
  return out;
}

}  // namespace

NbdAttachment attach_to_nbd(const NbdUri& uri, std::chrono::seconds limit,
                            const Credentials& credentials) {
  return shake_hands(connect(uri, limit), uri, limit, credentials);
}

NbdAttachment attach_over(UniqueFd connected, const std::string& export_name) {
  NbdUri uri;
  uri.export_name = export_name;
  return shake_hands(std::move(connected), uri, kNbdConnectLimit, {});
}

}  // namespace minivmm::cli
