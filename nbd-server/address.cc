// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/address.h"

#include <arpa/inet.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <sys/un.h>

#include <cerrno>
#include <cstddef>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"

namespace minivmm::nbd {
namespace {

// SAFETY of the casts below: sockaddr_storage is made to hold each of these, and the family that
// the kernel has put there says which one it is.
const sockaddr_in& as_v4(const sockaddr_storage& a) {
  return reinterpret_cast<const sockaddr_in&>(a);
}
const sockaddr_in6& as_v6(const sockaddr_storage& a) {
  return reinterpret_cast<const sockaddr_in6&>(a);
}

const sockaddr_vm& as_vsock(const sockaddr_storage& a) {
  return reinterpret_cast<const sockaddr_vm&>(a);
}

std::string host_text(const sockaddr_storage& a) {
  char text[INET6_ADDRSTRLEN] = "";
  if (a.ss_family == AF_INET) {
    ::inet_ntop(AF_INET, &as_v4(a).sin_addr, text, sizeof text);
  } else {
    ::inet_ntop(AF_INET6, &as_v6(a).sin6_addr, text, sizeof text);
  }
  return text;
}

uint16_t port_of(const sockaddr_storage& a) noexcept {
  return base::be_to_host(a.ss_family == AF_INET ? as_v4(a).sin_port : as_v6(a).sin6_port);
}

}  // namespace

bool is_loopback(const sockaddr_storage& address) noexcept {
  if (address.ss_family == AF_UNIX) return true;
  if (address.ss_family == AF_INET) {
    return base::be_to_host(uint32_t{as_v4(address).sin_addr.s_addr}) >> 24 == 127;
  }
  if (address.ss_family != AF_INET6) return false;
  const in6_addr& v6 = as_v6(address).sin6_addr;
  return IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
}

Uri uri_of_socket(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    throw base::errno_error(errno, fmt::format("descriptor {} is not a socket", fd));
  }
  Uri out;
  if (address.ss_family == AF_UNIX) {
    const auto& a = reinterpret_cast<const sockaddr_un&>(address);
    if (length <= offsetof(sockaddr_un, sun_path) || a.sun_path[0] == '\0') {
      throw base::Error(EINVAL, fmt::format("descriptor {}: the unix socket has no path", fd));
    }
    out.socket_path = a.sun_path;
  } else if (address.ss_family == AF_INET || address.ss_family == AF_INET6) {
    out.host = host_text(address);
    out.port = port_of(address);
  } else if (address.ss_family == AF_VSOCK) {
    out.vsock_cid = as_vsock(address).svm_cid;
    out.vsock_port = as_vsock(address).svm_port;
  } else {
    throw base::Error(EINVAL,
                      fmt::format("descriptor {} is neither a unix, TCP nor vsock socket", fd));
  }
  return out;
}

std::string peer_key(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) return {};
  if (address.ss_family == AF_INET || address.ss_family == AF_INET6) return host_text(address);
  ucred who{};
  socklen_t size = sizeof who;
  if (address.ss_family == AF_UNIX && ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) == 0) {
    return fmt::format("user {}", who.uid);
  }
  return {};
}

std::string peer_text(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) return "a client";
  if (address.ss_family == AF_INET || address.ss_family == AF_INET6) {
    const bool v4 = address.ss_family == AF_INET;
    return fmt::format("{}{}{}:{}", v4 ? "" : "[", host_text(address), v4 ? "" : "]",
                       port_of(address));
  }
  if (address.ss_family == AF_VSOCK) {
    return fmt::format("vsock {}:{}", as_vsock(address).svm_cid, as_vsock(address).svm_port);
  }
  ucred who{};
  socklen_t size = sizeof who;
  if (address.ss_family == AF_UNIX && ::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) == 0) {
    return fmt::format("process {}", who.pid);
  }
  return "a client";
}

}  // namespace minivmm::nbd
