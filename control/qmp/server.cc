// SPDX-License-Identifier: Apache-2.0
#include "control/qmp/server.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "base/io.h"
#include "base/log.h"
#include "base/pool.h"
#include "control/qmp/message.h"

namespace minivmm::control::qmp {

Server::Server(base::EventLoop& loop, Target& target, const SessionLimits& limits)
    : loop_(loop), target_(target), limits_(limits) {}

void Server::bind(const std::string& path) {
  socket_ = nbd::bind_unix(path);
  path_ = socket_.address.socket_path;
}

void Server::start() {
  if (!inside_.enter()) return;
  loop_.post("qmp listener", [self = shared_from_this()] {
    self->accept_clients();
    self->inside_.leave();
  });
}

void Server::accept_clients() {
  while (!accepting_.cancelled()) {
    const int fd = ::accept4(socket_.fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
      serve(base::UniqueFd(fd));
    } else if (errno == EAGAIN) {
      (void)base::io::poll(socket_.fd.get(), POLLIN, &accepting_);
    } else if (errno != EINTR && errno != ECONNABORTED) {
      // Out of descriptors or memory: who waits stays in the backlog.
      base::log_warning("{}: cannot accept a client: {}", path_, base::errno_text(errno));
      (void)base::io::sleep_for(std::chrono::milliseconds(500), &accepting_);
    }
  }
}

void Server::refuse(int fd) {
  const std::string line = error_line(
      std::make_exception_ptr(Failure(fmt::format(
          "{} clients use this control socket already, and more are not served", kMostClients))),
      {});
  (void)!::send(fd, line.data(), line.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
}

void Server::serve(base::UniqueFd connected) {
  if (stopping_ || !inside_.enter()) return;
  if (sessions_.size() >= kMostClients) {
    refuse(connected.get());
    inside_.leave();
    return;
  }
  auto session = std::make_shared<Session>(loop_, std::move(connected), target_, limits_);
  sessions_.push_back(session);
  loop_.spawn("qmp client", [self = shared_from_this(), session]() mutable {
    session->run();
    std::erase(self->sessions_, session);
    session.reset();
    self->inside_.leave();
  });
}

void Server::emit(std::string_view event, Json data) {
  loop_.post("qmp event", [self = shared_from_this(), line = event_line(event, data)] {
    // Sending may cut a client off; the list stays as it is meanwhile.
    for (const auto& session : self->sessions_) session->send_event(line);
  });
}

std::vector<std::string> Server::stop(base::Clock::time_point deadline) {
  // The file goes first, so that nobody finds a socket that does not answer.
  base::Pool::errands().run([&] { socket_.file.remove(); });
  stopping_ = true;
  accepting_.cancel();
  for (const auto& session : sessions_) session->end();
  std::vector<std::string> out;
  if (inside_.close_until(deadline)) return out;
  for (const auto& session : sessions_) {
    if (session->running().empty()) continue;
    out.push_back(fmt::format("control socket: the command {} has not ended", session->running()));
  }
  return out;
}

}  // namespace minivmm::control::qmp
