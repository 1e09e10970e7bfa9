// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "base/pool.h"
#include "nbd-server/address.h"
#include "nbd-server/bind.h"

namespace minivmm::nbd {
namespace {

constexpr int kBacklog = 1024;

// By which the other side reaches this machine.
uint32_t own_cid() noexcept {
  const base::UniqueFd device(::open("/dev/vsock", O_RDONLY | O_CLOEXEC));
  unsigned cid = VMADDR_CID_ANY;
  if (!device || ::ioctl(device.get(), IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid) != 0) {
    return VMADDR_CID_ANY;
  }
  return cid;
}

BoundSocket listen_on(const Uri& address) {
  BoundSocket out;
  out.fd.reset(::socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_vm at{};
  at.svm_family = AF_VSOCK;
  at.svm_cid = *address.vsock_cid;
  at.svm_port = address.vsock_port;
  if (!out.fd || ::bind(out.fd.get(), reinterpret_cast<const sockaddr*>(&at), sizeof at) != 0 ||
      ::listen(out.fd.get(), kBacklog) != 0) {
    throw base::errno_error(errno, fmt::format("{}: cannot listen", address.text()));
  }
  out.address = uri_of_socket(out.fd.get());
  if (*out.address.vsock_cid == VMADDR_CID_ANY) out.address.vsock_cid = own_cid();
  out.tcp = true;
  return out;
}

}  // namespace

BoundSocket bind_vsock(const Uri& address, bool allow_remote) {
  if (const uint32_t cid = *address.vsock_cid; cid != VMADDR_CID_LOCAL && !allow_remote) {
    throw base::Error(EACCES,
                      fmt::format("{} is reachable from virtual machines or their host, and "
                                  "NBD without TLS has no protection: allow it with "
                                  "--nbd-allow-remote, or require TLS",
                                  address.text()));
  }
  return base::Pool::errands().run([&] { return listen_on(address); });
}

}  // namespace minivmm::nbd
