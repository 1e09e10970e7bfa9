// SPDX-License-Identifier: Apache-2.0
// minivmm nbd connect and disconnect: /dev/nbdN by the netlink interface of the kernel's driver.
#include <linux/nbd-netlink.h>
#include <linux/nbd.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <fstream>
#include <thread>
#include <vector>

#include <fmt/core.h>

#include "base/error.h"
#include "cli/command.h"
#include "cli/daemon_options.h"
#include "cli/generic_netlink.h"
#include "cli/nbd_attachment.h"
#include "cli/nbd_commands.h"

namespace minivmm::cli {

namespace po = boost::program_options;
using base::Error;
using std::chrono::seconds;

namespace {

constexpr uint64_t kMostConnections = 16;
constexpr uint64_t kMostSeconds = 86'400;
constexpr seconds kConnectLimit{30};
// Until the kernel shows or ends the device.
constexpr seconds kPatience{10};
// How long requests are held by `--persist` while there is no connection, if nothing is said.
constexpr uint64_t kUsualHold = 60;

GenericNetlink driver() {
  try {
    return GenericNetlink(NBD_GENL_FAMILY_NAME);
  } catch (const Error& e) {
    if (e.err() != ENOENT) throw;
    throw Error(ENODEV,
                "the kernel has no NBD driver: load it as root with `modprobe nbd` (it may be in a "
                "package of its own with the kernel's further modules)");
  }
}

// "/dev/nbd3", "nbd3".
uint32_t device_number(const std::string& name) {
  std::string_view digits = name;
  if (digits.starts_with("/dev/")) digits.remove_prefix(5);
  uint32_t out = 0;
  if (digits.starts_with("nbd")) {
    digits.remove_prefix(3);
    const char* const end = digits.data() + digits.size();
    const auto parsed = std::from_chars(digits.data(), end, out);
    if (!digits.empty() && parsed.ec == std::errc() && parsed.ptr == end) return out;
  }
  throw Error(EINVAL, fmt::format("{}: a device such as /dev/nbd0 is expected", name));
}

// The file is there for as long as the device is connected.
bool is_connected(uint32_t index) {
  return ::access(fmt::format("/sys/block/nbd{}/pid", index).c_str(), F_OK) == 0;
}

uint64_t sectors_of(uint32_t index) {
  uint64_t out = 0;
  std::ifstream(fmt::format("/sys/block/nbd{}/size", index)) >> out;
  return out;
}

template <typename Condition>
bool wait_for(Condition condition) {
  const auto until = std::chrono::steady_clock::now() + kPatience;
  while (!condition()) {
    if (std::chrono::steady_clock::now() >= until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return true;
}

struct Wanted {
  base::NbdUri uri;
  std::optional<uint32_t> index;
  uint64_t connections = 1;
  uint64_t block_size = 0;  // 0: what the server needs
  uint64_t timeout = 0;     // seconds; 0: none
  uint64_t hold = 0;        // seconds
  bool read_only = false;
  bool persist = false;
};

NetlinkAttributes socket_list(const std::vector<NbdAttachment>& attached) {
  NetlinkAttributes list;
  for (const NbdAttachment& each : attached) {
    NetlinkAttributes item;
    item.add_u32(NBD_SOCK_FD, static_cast<uint32_t>(each.socket.get()));
    list.add_nested(NBD_SOCK_ITEM, item);
  }
  return list;
}

std::vector<NbdAttachment> attach_all(const Wanted& wanted) {
  std::vector<NbdAttachment> out;
  out.push_back(attach_to_nbd(wanted.uri, kConnectLimit));
  if (wanted.connections > 1 && (out[0].flags & NBD_FLAG_CAN_MULTI_CONN) == 0) {
    throw Error(ENOTSUP, fmt::format("{}: the server does not allow several connections: leave "
                                     "--connections out",
                                     wanted.uri.text()));
  }
  while (out.size() < wanted.connections) {
    out.push_back(attach_to_nbd(wanted.uri, kConnectLimit));
    if (out.back().size != out[0].size) {
      throw Error(EIO, fmt::format("{}: its connections have different sizes", wanted.uri.text()));
    }
  }
  return out;
}

uint64_t choose_block_size(const Wanted& wanted, const NbdAttachment& first) {
  const uint64_t needed = std::max<uint64_t>(512, first.minimum_block);
  const uint64_t out = wanted.block_size != 0 ? wanted.block_size : needed;
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  if (std::has_single_bit(out) && out >= needed && out <= page) return out;
  throw Error(EINVAL, fmt::format("--block-size {}: a power of two from {} to {} is expected", out,
                                  needed, page));
}

uint32_t connect(GenericNetlink& kernel, const Wanted& wanted,
                 const std::vector<NbdAttachment>& attached) {
  const NbdAttachment& first = attached[0];
  uint64_t flags = first.flags;
  if (wanted.read_only) flags |= NBD_FLAG_READ_ONLY;
  NetlinkAttributes request;
  if (wanted.index) request.add_u32(NBD_ATTR_INDEX, *wanted.index);
  request.add_u64(NBD_ATTR_SIZE_BYTES, first.size);
  request.add_u64(NBD_ATTR_BLOCK_SIZE_BYTES, choose_block_size(wanted, first));
  request.add_u64(NBD_ATTR_SERVER_FLAGS, flags);
  if (wanted.timeout != 0) request.add_u64(NBD_ATTR_TIMEOUT, wanted.timeout);
  if (wanted.hold != 0) request.add_u64(NBD_ATTR_DEAD_CONN_TIMEOUT, wanted.hold);
  request.add_nested(NBD_ATTR_SOCKETS, socket_list(attached));
  try {
    const NetlinkBytes answer = kernel.request(NBD_CMD_CONNECT, request);
    const auto index = attribute_u32(answer, NBD_ATTR_INDEX);
    if (index) return *index;
    if (wanted.index) return *wanted.index;
  } catch (Error& e) {
    const std::string device =
        wanted.index ? fmt::format("/dev/nbd{}", *wanted.index) : "a free /dev/nbdN";
    if (e.err() == EBUSY) {
      throw Error(EBUSY, fmt::format("{}: is in use already; leave the device out for one that is "
                                     "free",
                                     device));
    }
    if (e.err() == EPERM) throw Error(EPERM, "only root can connect block devices");
    e.prepend(device);
    throw;
  }
  throw Error(EPROTO, "the kernel does not say which device it took");
}

// One connection in place of one that broke. False: not yet.
bool mend(GenericNetlink& kernel, const Wanted& wanted, uint32_t index, uint64_t size) {
  std::vector<NbdAttachment> attached;
  try {
    attached.push_back(attach_to_nbd(wanted.uri, kConnectLimit));
    if (attached[0].size != size) {
      throw Error(EIO, fmt::format("the export has {} bytes now, not {}", attached[0].size, size));
    }
    NetlinkAttributes request;
    request.add_u32(NBD_ATTR_INDEX, index);
    request.add_nested(NBD_ATTR_SOCKETS, socket_list(attached));
    (void)kernel.request(NBD_CMD_RECONFIGURE, request);
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
  while (is_connected(index)) {
    if (const auto message = kernel.receive(kLook)) {
      const bool ours = attribute_u32(message->attributes, NBD_ATTR_INDEX) == index;
      if (ours && message->command == NBD_CMD_LINK_DEAD) ++broken;
    }
    if (broken > 0 && is_connected(index) && mend(kernel, wanted, index, size)) --broken;
  }
}

Wanted take_wanted(const po::variables_map& values) {
  const auto names = given_names(values);
  if (names.empty() || names.size() > 2) {
    throw UsageError{"a server is expected, and a device such as /dev/nbd0 or none"};
  }
  Wanted out;
  out.uri = nbd_address(names[0]);
  if (const auto name = optional_text(values, "export-name")) out.uri.export_name = *name;
  if (names.size() == 2) out.index = device_number(names[1]);
  const auto number = [&](const char* key, uint64_t otherwise, uint64_t min, uint64_t max) {
    if (values.count(key) == 0) return otherwise;
    return parse_number(key, text_value(values, key), min, max);
  };
  out.connections = number("connections", 1, 1, kMostConnections);
  out.block_size = number("block-size", 0, 512, 1 << 20);
  out.timeout = number("timeout", 0, 1, kMostSeconds);
  out.read_only = is_set(values, "read-only");
  out.persist = is_set(values, "persist");
  out.hold = number("hold", out.persist ? kUsualHold : 0, 1, kMostSeconds);
  return out;
}

}  // namespace

ImageSyntax nbd_connect_syntax() {
  return nbd_syntax(
      "Usage: minivmm nbd connect [-C N] [-R] [--persist] URI|HOST[:PORT] [/dev/nbdN]\n\n"
      "Makes an NBD export a block device of this machine, with the kernel's own driver, and "
      "prints\n"
      "the device. Without one it is the first that is free. Needs root, and the driver: `modprobe "
      "nbd`.\n\n"
      "Examples:\n"
      "  minivmm nbd connect nbd://server/disk0\n"
      "  minivmm nbd connect -C 4 'nbd+unix:///disk0?socket=m.sock' /dev/nbd0\n"
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
  GenericNetlink kernel = driver();
  std::vector<NbdAttachment> attached = attach_all(wanted);
  // Before there is something to miss.
  if (wanted.persist) kernel.join(NBD_GENL_MCAST_GROUP_NAME);
  const uint32_t index = connect(kernel, wanted, attached);
  const std::string device = fmt::format("/dev/nbd{}", index);
  const uint64_t size = attached[0].size;
  attached.clear();  // the kernel has them
  const bool there = wait_for(
      [&] { return sectors_of(index) == size / 512 && ::access(device.c_str(), F_OK) == 0; });
  if (!there) throw Error(ETIMEDOUT, fmt::format("{}: the kernel does not show it", device));
  fmt::print("{}\n", device);
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
  const uint32_t index = device_number(names[0]);
  GenericNetlink kernel = driver();
  if (!is_connected(index)) {
    throw Error(ENOTCONN, fmt::format("/dev/nbd{}: is not connected", index));
  }
  NetlinkAttributes request;
  request.add_u32(NBD_ATTR_INDEX, index);
  (void)kernel.request(NBD_CMD_DISCONNECT, request);
  if (!wait_for([&] { return !is_connected(index); })) {
    throw Error(ETIMEDOUT, fmt::format("/dev/nbd{}: is still connected; is it in use?", index));
  }
  return 0;
}

}  // namespace minivmm::cli
