// SPDX-License-Identifier: Apache-2.0
// minivmm nbd connect and disconnect.
#include <linux/nbd-netlink.h>
#include <sys/wait.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/command.h"
#include "cli/daemon_options.h"
#include "cli/nbd_commands.h"
#include "cli/nbd_device.h"
#include "cli/nbd_tls_proxy.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;

namespace {

constexpr uint64_t kMostConnections = 16;
constexpr uint64_t kMostSeconds = 86'400;
// How long requests are held by `--persist` while there is no connection, if nothing is said.
constexpr uint64_t kUsualHold = 60;

struct Wanted {
  base::NbdUri uri;
  NbdDeviceOptions device;
  uint64_t connections = 1;
  bool persist = false;
};

// One connection in place of one that broke. False: not yet.
bool mend(GenericNetlink& kernel, const Wanted& wanted, uint32_t index, uint64_t size) {
  std::vector<NbdAttachment> attached;
  try {
    attached = attach_all_to_nbd(wanted.uri, 1);
    if (attached[0].size != size) {
      throw Error(EIO, fmt::format("the export has {} bytes now, not {}", attached[0].size, size));
    }
    (void)start_nbd_tls_proxy(attached, /*keeps_errors=*/true);
    mend_nbd_device(kernel, index, attached);
    fmt::print(stderr, "minivmm: /dev/nbd{}: connected again\n", index);
    return true;
  } catch (const Error& e) {
    fmt::print(stderr, "minivmm: /dev/nbd{}: {}\n", index, e.what());
    return false;
  }
}

// Stays for as long as the device is connected.
void keep_connected(GenericNetlink& kernel, const Wanted& wanted, uint32_t index, uint64_t size) {
  constexpr std::chrono::milliseconds kLook{500};
  unsigned broken = 0;
  while (is_nbd_connected(index)) {
    // What did TLS for connections that broke.
    while (::waitpid(-1, nullptr, WNOHANG) > 0) {
    }
    if (const auto message = kernel.receive(kLook)) {
      const bool ours = attribute_u32(message->attributes, NBD_ATTR_INDEX) == index;
      if (ours && message->command == NBD_CMD_LINK_DEAD) ++broken;
    }
    if (broken > 0 && is_nbd_connected(index) && mend(kernel, wanted, index, size)) --broken;
  }
}

Wanted take_wanted(const po::variables_map& values) {
  const auto names = given_names(values);
  if (names.empty() || names.size() > 2) {
    throw UsageError{"a server is expected, and a device such as /dev/nbd0 or none"};
  }
  Wanted out;
  out.uri = nbd_server(values, names[0]);
  if (const auto name = optional_text(values, "export-name")) out.uri.export_name = *name;
  if (names.size() == 2) out.device.index = nbd_device_number(names[1]);
  const auto number = [&](const char* key, uint64_t otherwise, uint64_t min, uint64_t max) {
    if (values.count(key) == 0) return otherwise;
    return parse_number(key, text_value(values, key), min, max);
  };
  out.connections = number("connections", 1, 1, kMostConnections);
  out.device.block_size = number("block-size", 0, 512, 1 << 20);
  out.device.timeout = number("timeout", 0, 1, kMostSeconds);
  out.device.read_only = is_set(values, "read-only");
  out.persist = is_set(values, "persist");
  out.device.hold = number("hold", out.persist ? kUsualHold : 0, 1, kMostSeconds);
  return out;
}

}  // namespace

ImageSyntax nbd_connect_syntax() {
  return nbd_server_syntax(
      "Usage: minivmm nbd connect [-C N] [-R] [--persist] URI|HOST[:PORT] [/dev/nbdN]\n\n"
      "Makes an NBD export a block device of this machine, with the kernel's own driver, and "
      "prints\n"
      "the device. Without one it is the first that is free. Needs root, and the driver: `modprobe "
      "nbd`.\n"
      "That driver does no TLS: where the server wants it, a process stays behind that does it, "
      "for\n"
      "as long as the device is connected.\n\n"
      "Examples:\n"
      "  minivmm nbd connect nbd://server/disk0\n"
      "  minivmm nbd connect -C 4 'nbd+unix:///disk0?socket=m.sock' /dev/nbd0\n"
      "  minivmm nbd connect 'nbds://server/disk0?tls-certificates=/etc/pki/minivmm'\n"
      "  minivmm nbd disconnect /dev/nbd0\n\n",
      {
          {"export-name,N", "NAME", "the export, if the URI does not say it"},
          {"connections,C", "N", "several connections, where the server allows them: up to 16"},
          {"block-size,b", "BYTES",
           "of the device; what the server needs, and 512 at least, if not "
           "said"},
          {"timeout,t", "SECONDS", "a request without an answer for so long fails"},
          {"read-only,R", nullptr, "nobody can write to the device"},
          {"persist,p", nullptr, "stay, and connect anew when a connection breaks"},
          {"hold", "SECONDS",
           "how long requests wait for a new connection; with --persist 60 if not "
           "said"},
      });
}

int run_nbd_connect(const po::variables_map& values) {
  const Wanted wanted = take_wanted(values);
  GenericNetlink kernel = nbd_driver();
  std::vector<NbdAttachment> attached = attach_all_to_nbd(wanted.uri, wanted.connections);
  (void)start_nbd_tls_proxy(attached, wanted.persist);
  // Before there is something to miss.
  if (wanted.persist) kernel.join(NBD_GENL_MCAST_GROUP_NAME);
  const uint32_t index = connect_nbd_device(kernel, wanted.device, attached);
  const uint64_t size = attached[0].size;
  attached.clear();  // the kernel has them
  fmt::print("/dev/nbd{}\n", index);
  std::fflush(stdout);
  if (wanted.persist) keep_connected(kernel, wanted, index, size);
  return 0;
}

ImageSyntax nbd_disconnect_syntax() {
  return nbd_syntax(
      "Usage: minivmm nbd disconnect /dev/nbdN\n\n"
      "Ends a device that `minivmm nbd connect` or nbd-client has made. Returns when it is "
      "gone.\n\n",
      {});
}

int run_nbd_disconnect(const po::variables_map& values) {
  const auto names = given_names(values);
  if (names.size() != 1) throw UsageError{"a device such as /dev/nbd0 is expected"};
  const uint32_t index = nbd_device_number(names[0]);
  GenericNetlink kernel = nbd_driver();
  if (!is_nbd_connected(index)) {
    throw Error(ENOTCONN, fmt::format("/dev/nbd{}: is not connected", index));
  }
  disconnect_nbd_device(kernel, index);
  return 0;
}

}  // namespace minivmm::cli
