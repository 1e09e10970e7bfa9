// SPDX-License-Identifier: Apache-2.0
#include "nbd_socket.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string_view>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include <netdb.h>

#include "base/error.h"

namespace minivmm::bench {
namespace {

sockaddr_un unix_address(const std::string& path) {
  sockaddr_un a{};
  a.sun_family = AF_UNIX;
  if (path.size() >= sizeof a.sun_path) {
    throw base::Error(ENAMETOOLONG, path + ": too long for a unix socket's path");
  }
  std::memcpy(a.sun_path, path.c_str(), path.size());
  return a;
}

using AddressList = std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)>;

AddressList resolve(const NbdAddress& address, int flags) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  const int r = ::getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &found);
  if (r != 0) throw base::Error(EHOSTUNREACH, address.host + ": " + ::gai_strerror(r));
  return {found, ::freeaddrinfo};
}

base::UniqueFd stream_socket(int family) {
  base::UniqueFd fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!fd) throw base::errno_error(errno, "cannot make a socket");
  return fd;
}

}  // namespace

NbdAddress parse_nbd_uri(const std::string& uri) {
  constexpr std::string_view kUnix = "nbd+unix:///";
  constexpr std::string_view kTcp = "nbd://";
  constexpr std::string_view kSocket = "?socket=";
  NbdAddress a;
  if (uri.starts_with(kUnix)) {
    const std::size_t query = uri.find(kSocket);
    if (query == uri.npos) throw base::Error(EINVAL, uri + ": needs ?socket=PATH");
    a.export_name = uri.substr(kUnix.size(), query - kUnix.size());
    a.path = uri.substr(query + kSocket.size());
    return a;
  }
  if (!uri.starts_with(kTcp)) {
    throw base::Error(EINVAL, uri + ": give nbd+unix:///NAME?socket=PATH or nbd://HOST:PORT/NAME");
  }
  const std::size_t slash = uri.find('/', kTcp.size());
  std::string host = uri.substr(kTcp.size(), slash == uri.npos ? uri.npos : slash - kTcp.size());
  if (slash != uri.npos) a.export_name = uri.substr(slash + 1);
  const std::size_t colon = host.rfind(':');
  a.port = colon == host.npos ? "10809" : host.substr(colon + 1);
  a.host = host.substr(0, colon);
  return a;
}

void tune_stream(int fd) {
  const int one = 1;
  // Fails harmlessly on a unix socket.
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  int domain = 0;
  socklen_t length = sizeof domain;
  ::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
  if (domain != AF_UNIX) return;  // TCP sizes its own buffers
  const int size = 4 << 20;
  ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
  ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
}

base::UniqueFd connect_to(const NbdAddress& address) {
  if (!address.path.empty()) {
    base::UniqueFd fd = stream_socket(AF_UNIX);
    const sockaddr_un a = unix_address(address.path);
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&a), sizeof a) != 0) {
      throw base::errno_error(errno, address.path + ": cannot connect");
    }
    tune_stream(fd.get());
    return fd;
  }
  const AddressList list = resolve(address, 0);
  int err = EHOSTUNREACH;
  for (const addrinfo* a = list.get(); a != nullptr; a = a->ai_next) {
    base::UniqueFd fd = stream_socket(a->ai_family);
    if (::connect(fd.get(), a->ai_addr, a->ai_addrlen) == 0) {
      tune_stream(fd.get());
      return fd;
    }
    err = errno;
  }
  throw base::errno_error(err, address.host + ":" + address.port + ": cannot connect");
}

base::UniqueFd listen_at(const NbdAddress& address) {
  base::UniqueFd fd;
  int r = -1;
  if (!address.path.empty()) {
    fd = stream_socket(AF_UNIX);
    const sockaddr_un a = unix_address(address.path);
    ::unlink(address.path.c_str());
    r = ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&a), sizeof a);
  } else {
    const AddressList list = resolve(address, AI_PASSIVE);
    fd = stream_socket(list->ai_family);
    const int one = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    r = ::bind(fd.get(), list->ai_addr, list->ai_addrlen);
  }
  if (r != 0 || ::listen(fd.get(), 16) != 0) throw base::errno_error(errno, "cannot listen");
  return fd;
}

void send_all(int fd, const void* data, std::size_t size) {
  const char* p = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = ::send(fd, p, size, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw base::errno_error(errno, "cannot send");
    p += n;
    size -= static_cast<std::size_t>(n);
  }
}

void recv_all(int fd, void* data, std::size_t size) {
  char* p = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t n = ::recv(fd, p, size, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw base::errno_error(errno, "cannot receive");
    if (n == 0) throw base::Error(ECONNRESET, "the peer ended the connection");
    p += n;
    size -= static_cast<std::size_t>(n);
  }
}

}  // namespace minivmm::bench
