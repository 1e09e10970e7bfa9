// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include <fmt/core.h>
#include <netdb.h>

#include "base/error.h"
#include "base/io.h"
#include "base/pool.h"
#include "nbd-server/address.h"
#include "nbd-server/bind.h"

namespace minivmm::nbd {
namespace {

using base::errno_error;
using base::Error;
using base::UniqueFd;

constexpr auto kPatience = std::chrono::seconds(2);
constexpr auto kRetry = std::chrono::milliseconds(20);
constexpr int kBacklog = 1024;

struct Resolved {
  sockaddr_storage address{};
  socklen_t length = 0;
};

std::vector<Resolved> resolve(const std::string& host, uint16_t port) {
  auto work = [&host, port] {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
    addrinfo* found = nullptr;
    const int failed = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
    if (failed != 0) {
      throw Error(EHOSTUNREACH, fmt::format("{}: {}", host, ::gai_strerror(failed)));
    }
    std::vector<Resolved> out;
    for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
      if (a->ai_addrlen > sizeof(sockaddr_storage)) continue;
      Resolved each;
      std::memcpy(&each.address, a->ai_addr, a->ai_addrlen);
      each.length = a->ai_addrlen;
      out.push_back(each);
    }
    ::freeaddrinfo(found);
    return out;
  };
  return base::Pool::errands().run(std::move(work));
}

// A listening socket, or an errno value.
int try_listen(const Resolved& at, UniqueFd& out) noexcept {
  const int family = at.address.ss_family;
  UniqueFd fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return errno;
  const int one = 1;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (family == AF_INET6) ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&at.address), at.length) != 0 ||
      ::listen(fd.get(), kBacklog) != 0) {
    return errno;
  }
  out = std::move(fd);
  return 0;
}

}  // namespace

BoundSocket bind_tcp(const Uri& address, bool allow_remote) {
  const std::string host = address.host.empty() ? "127.0.0.1" : address.host;
  const std::vector<Resolved> list = resolve(host, address.port);
  for (const Resolved& each : list) {
    if (allow_remote || is_loopback(each.address)) continue;
    throw Error(EACCES, fmt::format("{} is reachable from other machines, and NBD without TLS has "
                                    "no protection: allow it with --nbd-allow-remote, or listen on "
                                    "127.0.0.1 or a unix socket",
                                    address.text()));
  }
  const auto deadline = base::Clock::now() + kPatience;
  for (;;) {
    int err = EADDRNOTAVAIL;
    for (const Resolved& each : list) {
      BoundSocket out;
      const int failed = base::Pool::errands().run([&] { return try_listen(each, out.fd); });
      if (failed == 0) {
        out.address = uri_of_socket(out.fd.get());
        out.tcp = true;
        return out;
      }
      err = failed;
    }
    if (err != EADDRINUSE || base::Clock::now() >= deadline) {
      throw errno_error(err, fmt::format("{}: cannot listen", address.text()));
    }
    (void)base::io::sleep_for(kRetry);
  }
}

BoundSocket adopt(UniqueFd fd) {
  BoundSocket out;
  out.address = uri_of_socket(fd.get());
  int listening = 0;
  socklen_t length = sizeof listening;
  if (::getsockopt(fd.get(), SOL_SOCKET, SO_ACCEPTCONN, &listening, &length) != 0 ||
      listening == 0) {
    throw Error(EINVAL, fmt::format("descriptor {} is not a listening socket", fd.get()));
  }
  const int flags = ::fcntl(fd.get(), F_GETFL);
  // Nor do the programs that we start need it.
  if (flags < 0 || ::fcntl(fd.get(), F_SETFL, flags | O_NONBLOCK) != 0 ||
      ::fcntl(fd.get(), F_SETFD, FD_CLOEXEC) != 0) {
    throw errno_error(errno, fmt::format("descriptor {}", fd.get()));
  }
  out.tcp = !out.address.is_unix();
  out.fd = std::move(fd);
  return out;
}

}  // namespace minivmm::nbd
