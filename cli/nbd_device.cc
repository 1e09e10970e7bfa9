// SPDX-License-Identifier: Apache-2.0
#include "cli/nbd_device.h"

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

#include <fmt/core.h>

#include "base/error.h"
#include "cli/nbd_channel.h"

namespace minivmm::cli {

using base::Error;

namespace {

// Until the kernel shows or ends the device.
constexpr std::chrono::seconds kPatience{10};

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

NetlinkAttributes socket_list(const std::vector<NbdAttachment>& attached) {
  NetlinkAttributes list;
  for (const NbdAttachment& each : attached) {
    NetlinkAttributes item;
    item.add_u32(NBD_SOCK_FD, static_cast<uint32_t>(each.socket.get()));
    list.add_nested(NBD_SOCK_ITEM, item);
  }
  return list;
}

uint64_t choose_block_size(const NbdDeviceOptions& wanted, const NbdAttachment& first) {
  const uint64_t needed = std::max<uint64_t>(512, first.minimum_block);
  const uint64_t out = wanted.block_size != 0 ? wanted.block_size : needed;
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  if (std::has_single_bit(out) && out >= needed && out <= page) return out;
  throw Error(EINVAL, fmt::format("--block-size {}: a power of two from {} to {} is expected", out,
                                  needed, page));
}

uint32_t start_device(GenericNetlink& kernel, const NbdDeviceOptions& wanted,
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
  if (!wanted.backend.empty()) request.add_text(NBD_ATTR_BACKEND_IDENTIFIER, wanted.backend);
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

}  // namespace

GenericNetlink nbd_driver() {
  try {
    return GenericNetlink(NBD_GENL_FAMILY_NAME);
  } catch (const Error& e) {
    if (e.err() != ENOENT) throw;
    throw Error(ENODEV,
                "the kernel has no NBD driver: load it as root with `modprobe nbd` (it may be in a "
                "package of its own with the kernel's further modules)");
  }
}

uint32_t nbd_device_number(const std::string& name) {
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
bool is_nbd_connected(uint32_t index) {
  return ::access(fmt::format("/sys/block/nbd{}/pid", index).c_str(), F_OK) == 0;
}

bool is_nbd_backend(uint32_t index, const std::string& backend) {
  std::string found;
  std::getline(std::ifstream(fmt::format("/sys/block/nbd{}/backend", index)), found);
  return found == backend && is_nbd_connected(index);
}

std::vector<NbdAttachment> attach_all_to_nbd(const base::NbdUri& uri, uint64_t connections) {
  const auto credentials = uri.tls ? nbd_credentials(uri) : nullptr;
  std::vector<NbdAttachment> out;
  out.push_back(attach_to_nbd(uri, kNbdConnectLimit, credentials));
  if (connections > 1 && (out[0].flags & NBD_FLAG_CAN_MULTI_CONN) == 0) {
    throw Error(ENOTSUP, fmt::format("{}: the server does not allow several connections: leave "
                                     "--connections out",
                                     uri.text()));
  }
  while (out.size() < connections) {
    out.push_back(attach_to_nbd(uri, kNbdConnectLimit, credentials));
    if (out.back().size != out[0].size) {
      throw Error(EIO, fmt::format("{}: its connections have different sizes", uri.text()));
    }
  }
  return out;
}

uint32_t connect_nbd_device(GenericNetlink& kernel, const NbdDeviceOptions& options,
                            const std::vector<NbdAttachment>& attached) {
  const uint32_t index = start_device(kernel, options, attached);
  const std::string device = fmt::format("/dev/nbd{}", index);
  const bool there = wait_for([&] {
    return sectors_of(index) == attached[0].size / 512 && ::access(device.c_str(), F_OK) == 0;
  });
  if (!there) throw Error(ETIMEDOUT, fmt::format("{}: the kernel does not show it", device));
  return index;
}

void mend_nbd_device(GenericNetlink& kernel, uint32_t index,
                     const std::vector<NbdAttachment>& attached) {
  NetlinkAttributes request;
  request.add_u32(NBD_ATTR_INDEX, index);
  request.add_nested(NBD_ATTR_SOCKETS, socket_list(attached));
  (void)kernel.request(NBD_CMD_RECONFIGURE, request);
}

void disconnect_nbd_device(GenericNetlink& kernel, uint32_t index) {
  NetlinkAttributes request;
  request.add_u32(NBD_ATTR_INDEX, index);
  (void)kernel.request(NBD_CMD_DISCONNECT, request);
  if (!wait_for([&] { return !is_nbd_connected(index); })) {
    throw Error(ETIMEDOUT, fmt::format("/dev/nbd{}: is still connected; is it in use?", index));
  }
}

}  // namespace minivmm::cli
