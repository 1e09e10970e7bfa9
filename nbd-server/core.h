// SPDX-License-Identifier: Apache-2.0
// The server behind nbd::Server. Shared with the fibers of listeners and clients, which may end
// after the Server does. Any thread, but what server.h says runs on a fiber.
#pragma once

#include <string>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "base/cancel.h"
#include "base/loop_group.h"
#include "base/sync.h"
#include "nbd-server/bind.h"
#include "nbd-server/budget.h"
#include "nbd-server/connection.h"
#include "nbd-server/export.h"
#include "nbd-server/resources.h"
#include "nbd-server/server.h"

namespace minivmm::nbd {

class Server::Core : public std::enable_shared_from_this<Server::Core> {
 public:
  Core(base::LoopGroup& loops, ServerOptions options);

  void add_export(std::shared_ptr<Export> added);
  void remove_export(const std::string& name, base::Clock::time_point deadline, bool only_unused);
  std::string listen(ListenOptions options);
  void serve(base::UniqueFd connected, Connection::Terms terms = {}, unsigned max_per_client = 0);
  std::vector<std::string> uris() const;
  std::vector<std::string> stop(base::Clock::time_point deadline);
  std::vector<std::string> describe() const;
  // Ends everything without waiting.
  void abandon() noexcept;

 private:
  struct Listener {
    BoundSocket socket;
    Connection::Terms terms;
    unsigned max_connections = 0;
    unsigned max_per_client = 0;
    base::EventLoop* loop = nullptr;
    base::CancelSource cancel;  // loop's thread only
  };
  using Clients = std::vector<std::shared_ptr<Connection>>;

  // Of the loops' pools.
  class Kept final : public KeptBuffers {
   public:
    explicit Kept(Core& core) noexcept : core_(core) {}
    bool too_much() const noexcept override;
    void trim_all() noexcept override;

   private:
    Core& core_;
    std::atomic<bool> trimming_{false};
  };

  void accept_clients(Listener& listener);
  void accept_ready(Listener& listener);
  // Returns whether it was the last one.
  bool run_client(Connection& client);
  base::EventLoop* shared_loop(uint64_t client) noexcept;
  bool full(const Listener& listener) const;
  bool admits(const Connection& client, unsigned max_per_client);
  Clients clients() const;
  Clients clients_of(const Export& target) const;
  void close_listeners();
  void warn_if_open_to_writers() const;
  static void close_export(const std::shared_ptr<Export>& target, base::Clock::time_point deadline);

  base::LoopGroup& loops_;
  const ServerOptions options_;
  ExportTable exports_;
  Budgets budgets_;
  Kept kept_;
  ResourcesOfLoops resources_;

  mutable std::mutex mutex_;
  bool closed_ = false;                                      // guarded by mutex_
  uint64_t next_id_ = 1;                                     // guarded by mutex_
  std::vector<std::shared_ptr<Listener>> listeners_;         // guarded by mutex_
  std::map<uint64_t, std::shared_ptr<Connection>> clients_;  // guarded by mutex_
  base::Gate clients_inside_;
  base::Gate listeners_inside_;
};

}  // namespace minivmm::nbd
