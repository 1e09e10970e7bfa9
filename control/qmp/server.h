// SPDX-License-Identifier: Apache-2.0
// The control socket: listens on a unix socket that only this user can open, and serves each client
// with a Session, on one loop. Owned by the daemon; the loop and the target outlive it.
#pragma once

#include <string>
#include <string_view>

#include <memory>
#include <vector>

#include "base/cancel.h"
#include "base/event_loop.h"
#include "base/sync.h"
#include "control/qmp/json.h"
#include "control/qmp/session.h"
#include "nbd-server/bind.h"

namespace minivmm::control::qmp {

// So many clients at once; another one is told so and let go.
inline constexpr size_t kMostClients = 16;

class Server : public std::enable_shared_from_this<Server> {
 public:
  // To be made by std::make_shared: clients' fibers hold it.
  Server(base::EventLoop& loop, Target& target, const SessionLimits& limits = {});
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // Makes the socket; clients can connect, and wait. Fiber. Throws as nbd::bind_unix.
  void bind(const std::string& path);
  // Serves those who have connected, and who will. Any thread.
  void start();
  // Serves one client whose socket is connected (tests). The loop's thread.
  void serve(base::UniqueFd connected);

  // Tells every client that has negotiated. Any thread; does not wait.
  void emit(std::string_view event, Json data);

  // Nobody can connect any more, no new command is begun; waits for those under way, and lets each
  // client have its answers. Fiber of the loop. Returns a line for each command that still runs at
  // the deadline: what it uses cannot be taken down.
  std::vector<std::string> stop(base::Clock::time_point deadline);

  // "control socket /run/m.qmp: 2 clients". Any thread once bind() has returned.
  const std::string& path() const noexcept { return path_; }

 private:
  void accept_clients();
  void refuse(int fd);

  base::EventLoop& loop_;
  Target& target_;
  const SessionLimits limits_;
  std::string path_;
  nbd::BoundSocket socket_;
  // The loop's thread.
  bool stopping_ = false;
  base::CancelSource accepting_;
  std::vector<std::shared_ptr<Session>> sessions_;
  base::Gate inside_;  // fibers of clients, and that which accepts
};

}  // namespace minivmm::control::qmp
