// SPDX-License-Identifier: Apache-2.0
#include "cli/control_client.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

#include <fmt/core.h>

#include "base/error.h"

namespace minivmm::cli {

using base::errno_error;
using base::Error;
using control::qmp::Json;
using std::chrono::milliseconds;

namespace {

// Longer answers are somebody else's protocol.
constexpr size_t kMostAnswer = size_t{64} << 20;

base::UniqueFd connect_to(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    throw Error(ENAMETOOLONG, fmt::format("{}: a socket's path has 1 to {} bytes", path,
                                          sizeof address.sun_path - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  base::UniqueFd out(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!out) throw errno_error(errno, "cannot make a socket");
  if (::connect(out.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    throw errno_error(errno, fmt::format("{}: nobody can be reached there (is it what --qmp unix: "
                                         "says?)",
                                         path));
  }
  return out;
}

}  // namespace

ControlClient::ControlClient(std::string path, milliseconds limit)
    : path_(std::move(path)), limit_(limit), socket_(connect_to(path_)) {
  const auto greeting = receive(limit_);
  if (greeting && greeting->contains("error")) {
    throw Error(EBUSY, fmt::format("{}: {}", path_, (*greeting)["error"].value("desc", "")));
  }
  if (!greeting || !greeting->contains("QMP")) {
    throw Error(EPROTO, path_ + ": what listens there does not speak QMP");
  }
  const Json reply = ask({{"execute", "qmp_capabilities"}});
  if (!reply.contains("return")) throw Error(EPROTO, path_ + ": negotiation failed");
}

void ControlClient::send(std::string text) {
  text += '\n';
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = ::send(socket_.get(), text.data() + done, text.size() - done, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw errno_error(errno, path_);
    done += static_cast<size_t>(n);
  }
}

// None: the end.
std::optional<Json> ControlClient::receive(milliseconds limit) {
  for (;;) {
    if (const size_t end = waiting_.find('\n'); end != std::string::npos) {
      Json out = Json::parse(waiting_.substr(0, end), nullptr, false);
      waiting_.erase(0, end + 1);
      if (!out.is_object()) throw Error(EPROTO, path_ + ": an answer is no JSON object");
      return out;
    }
    pollfd ready{socket_.get(), POLLIN, 0};
    const int wait =
        limit.count() > 0 ? static_cast<int>(std::min<int64_t>(limit.count(), INT_MAX)) : -1;
    const int found = ::poll(&ready, 1, wait);
    if (found == 0) throw Error(ETIMEDOUT, path_ + ": no answer in time");
    if (found < 0) continue;
    char piece[2048];
    const ssize_t n = ::recv(socket_.get(), piece, sizeof piece, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw errno_error(errno, path_);
    if (n == 0) return std::nullopt;
    waiting_.append(piece, static_cast<size_t>(n));
    if (waiting_.size() > kMostAnswer) throw Error(EMSGSIZE, path_ + ": an answer without end");
  }
}

Json ControlClient::answer() {
  for (;;) {
    auto message = receive(limit_);
    if (!message) throw Error(ECONNRESET, path_ + ": the other side closed the connection");
    if (!message->contains("event")) return std::move(*message);
    events_.push_back(std::move(*message));
  }
}

Json ControlClient::ask(const Json& message) {
  send(message.dump(-1, ' ', true, Json::error_handler_t::replace));
  return answer();
}

std::optional<Json> ControlClient::next_event() {
  if (!events_.empty()) {
    Json out = std::move(events_.front());
    events_.pop_front();
    return out;
  }
  auto message = receive(milliseconds(0));
  if (message && !message->contains("event")) {
    throw Error(EPROTO, path_ + ": an answer that nobody asked for");
  }
  return message;
}

}  // namespace minivmm::cli
