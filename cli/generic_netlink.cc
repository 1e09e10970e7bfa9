// SPDX-License-Identifier: Apache-2.0
#include "cli/generic_netlink.h"

#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::cli {
namespace {

using base::Error;
using Bytes = std::span<const std::byte>;

constexpr size_t kMaxMessage = 64 << 10;
constexpr unsigned kTypeMask = 0x3fff;  // NLA_TYPE_MASK, whose type is int

constexpr size_t padded(size_t size) noexcept { return (size + 3) & ~size_t{3}; }

template <typename T>
void append(NetlinkBytes& to, const T& value) {
  const auto bytes = std::as_bytes(std::span(&value, 1));
  to.insert(to.end(), bytes.begin(), bytes.end());
  to.resize(padded(to.size()));
}

// Nullopt where the bytes are too few.
template <typename T>
std::optional<T> take(Bytes& from) {
  if (from.size() < sizeof(T)) return std::nullopt;
  T out;
  std::memcpy(&out, from.data(), sizeof out);
  from = from.subspan(std::min(padded(sizeof out), from.size()));
  return out;
}

// The first attribute, which is taken away.
struct Attribute {
  uint16_t type;
  Bytes payload;
};
std::optional<Attribute> take_attribute(Bytes& from) {
  const Bytes all = from;
  const auto head = take<nlattr>(from);
  if (!head || head->nla_len < sizeof(nlattr) || head->nla_len > all.size()) return std::nullopt;
  from = all.subspan(std::min(padded(head->nla_len), all.size()));
  return Attribute{static_cast<uint16_t>(head->nla_type & kTypeMask),
                   all.subspan(sizeof(nlattr), head->nla_len - sizeof(nlattr))};
}

std::string text_of(Bytes payload) {
  const std::string out(reinterpret_cast<const char*>(payload.data()), payload.size());
  return out.substr(0, out.find('\0'));
}

// What the kernel says of an error, behind the number and the request's header.
std::string words_of(const nlmsghdr& head, Bytes payload) {
  if ((head.nlmsg_flags & NLM_F_ACK_TLVS) == 0 || payload.size() < sizeof(nlmsgerr)) return {};
  const auto text = find_attribute(payload.subspan(sizeof(nlmsgerr)), NLMSGERR_ATTR_MSG);
  return text ? text_of(*text) : std::string();
}

}  // namespace

void NetlinkAttributes::add(uint16_t type, Bytes payload) {
  nlattr head{};
  head.nla_len = static_cast<uint16_t>(sizeof head + payload.size());
  head.nla_type = type;
  append(bytes_, head);
  bytes_.insert(bytes_.end(), payload.begin(), payload.end());
  bytes_.resize(padded(bytes_.size()));
}

void NetlinkAttributes::add_u32(uint16_t type, uint32_t value) {
  add(type, std::as_bytes(std::span(&value, 1)));
}

void NetlinkAttributes::add_u64(uint16_t type, uint64_t value) {
  add(type, std::as_bytes(std::span(&value, 1)));
}

void NetlinkAttributes::add_text(uint16_t type, const std::string& text) {
  add(type, std::as_bytes(std::span(text.c_str(), text.size() + 1)));
}

void NetlinkAttributes::add_nested(uint16_t type, const NetlinkAttributes& inner) {
  add(static_cast<uint16_t>(type | NLA_F_NESTED), inner.bytes());
}

std::optional<Bytes> find_attribute(Bytes attributes, uint16_t type) {
  while (const auto each = take_attribute(attributes)) {
    if (each->type == type) return each->payload;
  }
  return std::nullopt;
}

std::optional<uint32_t> attribute_u32(Bytes attributes, uint16_t type) {
  const auto payload = find_attribute(attributes, type);
  uint32_t out = 0;
  if (!payload || payload->size() != sizeof out) return std::nullopt;
  std::memcpy(&out, payload->data(), sizeof out);
  return out;
}

GenericNetlink::GenericNetlink(const char* family)
    : socket_(::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC)) {
  if (!socket_) throw base::errno_error(errno, "generic netlink");
  const int one = 1;
  (void)::setsockopt(socket_.get(), SOL_NETLINK, NETLINK_EXT_ACK, &one, sizeof one);
  (void)::setsockopt(socket_.get(), SOL_NETLINK, NETLINK_CAP_ACK, &one, sizeof one);
  NetlinkAttributes name;
  name.add_text(CTRL_ATTR_FAMILY_NAME, family);
  send(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, 1, name);
  const NetlinkBytes found = answer();
  const auto id = find_attribute(found, CTRL_ATTR_FAMILY_ID);
  if (!id || id->size() != sizeof family_)
    throw Error(ENOENT, fmt::format("{}: no family", family));
  std::memcpy(&family_, id->data(), sizeof family_);
  if (const auto groups = find_attribute(found, CTRL_ATTR_MCAST_GROUPS)) {
    groups_.assign(groups->begin(), groups->end());
  }
}

void GenericNetlink::send(uint16_t type, uint8_t command, uint8_t version,
                          const NetlinkAttributes& attributes) {
  NetlinkBytes message;
  nlmsghdr head{};
  head.nlmsg_len = static_cast<uint32_t>(NLMSG_HDRLEN + GENL_HDRLEN + attributes.bytes().size());
  head.nlmsg_type = type;
  head.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
  head.nlmsg_seq = ++sequence_;
  append(message, head);
  append(message, genlmsghdr{.cmd = command, .version = version, .reserved = 0});
  message.insert(message.end(), attributes.bytes().begin(), attributes.bytes().end());
  if (::send(socket_.get(), message.data(), message.size(), 0) < 0) {
    throw base::errno_error(errno, "generic netlink: send");
  }
}

// Up to the acknowledgement of the last request.
NetlinkBytes GenericNetlink::answer() {
  NetlinkBytes out;
  NetlinkBytes buffer(kMaxMessage);
  for (;;) {
    const ssize_t n = ::recv(socket_.get(), buffer.data(), buffer.size(), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw base::errno_error(errno, "generic netlink: receive");
    for (Bytes rest(buffer.data(), static_cast<size_t>(n)); !rest.empty();) {
      Bytes message = rest;
      const auto head = take<nlmsghdr>(message);
      if (!head || head->nlmsg_len < NLMSG_HDRLEN || head->nlmsg_len > rest.size()) break;
      message = rest.subspan(NLMSG_HDRLEN, head->nlmsg_len - NLMSG_HDRLEN);
      rest = rest.subspan(std::min(padded(head->nlmsg_len), rest.size()));
      if (head->nlmsg_type == NLMSG_ERROR && head->nlmsg_seq == sequence_) {
        Bytes payload = message;
        const int error = -take<int>(payload).value_or(-EPROTO);
        if (error == 0) return out;
        const std::string words = words_of(*head, message);
        throw base::errno_error(error, words.empty() ? "the kernel refuses" : words);
      }
      const auto command = take<genlmsghdr>(message);
      if (!command) continue;
      if (head->nlmsg_seq == sequence_) {
        out.assign(message.begin(), message.end());
      } else if (head->nlmsg_type == family_) {
        unasked_.push_back({command->cmd, {message.begin(), message.end()}});
      }
    }
  }
}

NetlinkBytes GenericNetlink::request(uint8_t command, const NetlinkAttributes& attributes) {
  send(family_, command, 1, attributes);
  return answer();
}

void GenericNetlink::join(const char* group) {
  Bytes groups = groups_;
  while (const auto each = take_attribute(groups)) {
    const auto name = find_attribute(each->payload, CTRL_ATTR_MCAST_GRP_NAME);
    const auto id = attribute_u32(each->payload, CTRL_ATTR_MCAST_GRP_ID);
    if (!name || !id || text_of(*name) != group) continue;
    if (::setsockopt(socket_.get(), SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &*id, sizeof *id) != 0) {
      throw base::errno_error(errno, fmt::format("generic netlink: the group {}", group));
    }
    return;
  }
  throw Error(ENOENT, fmt::format("generic netlink: no group {}", group));
}

std::optional<GenericNetlink::Message> GenericNetlink::receive(std::chrono::milliseconds limit) {
  if (unasked_.empty()) {
    pollfd fd{socket_.get(), POLLIN, 0};
    if (::poll(&fd, 1, static_cast<int>(limit.count())) <= 0) return std::nullopt;
    NetlinkBytes buffer(kMaxMessage);
    const ssize_t n = ::recv(socket_.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
    if (n < 0) return std::nullopt;
    Bytes message(buffer.data(), static_cast<size_t>(n));
    const auto head = take<nlmsghdr>(message);
    const auto command = take<genlmsghdr>(message);
    if (!head || !command || head->nlmsg_type != family_) return std::nullopt;
    unasked_.push_back({command->cmd, {message.begin(), message.end()}});
  }
  Message out = std::move(unasked_.front());
  unasked_.erase(unasked_.begin());
  return out;
}

}  // namespace minivmm::cli
