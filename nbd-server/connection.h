// SPDX-License-Identifier: Apache-2.0
// One client from accept to close: the handshake, then sessions, one after the other where it
// changes loops (placement.h). Shared by the server's table of clients and by the fiber that runs
// it; lives on one loop, from which it visits others.
#pragma once

#include <string>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>

#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "nbd-server/budget.h"
#include "nbd-server/export.h"
#include "nbd-server/negotiation.h"
#include "nbd-server/resources.h"
#include "nbd-server/session.h"
#include "nbd-server/stream.h"

namespace minivmm::nbd {

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  struct Environment {
    const ServerOptions& options;
    const ExportTable& exports;
    const ResourcesOfLoops& resources;
    Budgets& budgets;
    base::EventLoop* shared;  // see placement.h
  };

  // What the listener says that the client came by.
  struct Terms {
    Security security = {};
    std::optional<std::chrono::milliseconds> handshake_limit = {};
    std::optional<std::chrono::milliseconds> idle_limit = {};
    const void* listener = nullptr;  // compared, never followed
  };

  Connection(uint64_t id, base::EventLoop& loop, base::UniqueFd socket, Terms terms);

  // The connection's fiber, on its loop. Returns when everything of this client has ended.
  void run(const Environment& environment);

  // Any thread. end_soon: no further requests are taken, those in flight are finished and
  // answered. cut: the socket is broken, so that nobody waits for the client.
  void end_soon();
  void cut() noexcept {
    in_handshake_.store(false, std::memory_order_relaxed);
    stream_.shutdown();
  }

  uint64_t id() const noexcept { return id_; }
  uint32_t in_flight() const noexcept {
    return counters_.in_flight.load(std::memory_order_relaxed);
  }
  bool in_handshake() const noexcept { return in_handshake_.load(std::memory_order_relaxed); }
  // Whose it is (peer_key).
  const std::string& key() const noexcept { return key_; }
  const void* listener() const noexcept { return terms_.listener; }
  bool uses(const Export& target) const;
  // It has chosen an export, whatever became of it then.
  bool entered() const;
  // "client 3 (process 4711) of 'disk0': 2 requests in flight, 1234 done, 0 errors".
  std::string describe() const;

 private:
  const char* serve(const Environment& environment);
  const char* run_sessions(const Environment& environment, const Agreement& agreed);
  const char* run_session(const Environment& environment, const Agreement& agreed,
                          base::CancelSource& cancel, Placement& placement);
  const char* run_elsewhere(const Environment& environment, const Agreement& agreed,
                            Placement& placement);
  void cancel_session() noexcept;
  bool choose(const std::shared_ptr<Export>& target);

  const uint64_t id_;
  base::EventLoop& loop_;
  Stream stream_;
  const Terms terms_;
  const std::string peer_;
  const std::string key_;
  std::atomic<bool> in_handshake_{true};
  SessionCounters counters_;

  mutable std::mutex mutex_;
  std::shared_ptr<Export> export_;  // guarded by mutex_; what was chosen

  // The loop's thread only.
  base::CancelSource cancel_;
  base::EventLoop* away_ = nullptr;  // where the session is, if not here

  // The thread of the loop on which the session is.
  Session* session_ = nullptr;
  base::CancelSource* session_cancel_ = nullptr;
};

}  // namespace minivmm::nbd
