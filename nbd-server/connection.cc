// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/connection.h"

#include <algorithm>
#include <exception>

#include <fmt/core.h>

#include "base/log.h"
#include "base/sync.h"

namespace minivmm::nbd {
namespace {

// What a client gets to take what is on its way to it.
constexpr auto kFarewell = std::chrono::seconds(2);

}  // namespace

Connection::Connection(uint64_t id, base::EventLoop& loop, base::UniqueFd socket, Terms terms)
    : id_(id),
      loop_(loop),
      stream_(std::move(socket)),
      terms_(std::move(terms)),
      peer_(stream_.peer()),
      key_(stream_.peer_key()) {}

void Connection::run(const Environment& environment) {
  const char* why = "an internal error";
  try {
    why = serve(environment);
  } catch (const std::exception& e) {
    base::log_warning("NBD client {} ({}): {}", id_, peer_, e.what());
  }
  stream_.bye();
  stream_.linger(base::Clock::now() + kFarewell);
  stream_.shutdown();
  base::log_debug("NBD client {} ({}) is gone: {}", id_, peer_, why);
}

const char* Connection::serve(const Environment& environment) {
  const ServerOptions& options = environment.options;
  ConnectionCost cost(environment.budgets);
  std::optional<Agreement> agreed;
  {
    Negotiation negotiation(
        stream_, environment.exports, cancel_,
        base::Clock::now() + terms_.handshake_limit.value_or(options.handshake_limit),
        terms_.security, [this](const auto& target) { return choose(target); });
    agreed = negotiation.run();
    in_handshake_.store(false, std::memory_order_relaxed);
    if (!agreed) return negotiation.outcome();
  }
  if (stream_.tls() != nullptr) cost.set(ConnectionCost::kTls);
  // Where it has a disk of its own, that.
  if (!choose(agreed->target.shared())) return "the export was withdrawn";
  base::log_debug("NBD client {} ({}{}{}) uses '{}'", id_, peer_,
                  agreed->client.empty() ? "" : ", ", agreed->client, agreed->target->name());

  return run_sessions(environment, *agreed);
}

const char* Connection::run_sessions(const Environment& environment, const Agreement& agreed) {
  Placement placement(loop_, environment.shared);
  for (;;) {
    const char* const why = placement.away() ? run_elsewhere(environment, agreed, placement)
                                             : run_session(environment, agreed, cancel_, placement);
    if (why != nullptr) return why;
    placement.move();
    base::log_debug("NBD client {} goes on on {}", id_, placement.here().name());
  }
}

// On the loop of `placement`, to which `cancel` belongs.
const char* Connection::run_session(const Environment& environment, const Agreement& agreed,
                                    base::CancelSource& cancel, Placement& placement) {
  const ServerOptions& options = environment.options;
  const SessionOptions session_options{.idle_limit = terms_.idle_limit.value_or(options.idle_limit),
                                       .stall_limit = options.stall_limit,
                                       .memory = options.connection_memory};
  base::EventLoop& loop = placement.here();
  Resources& resources = *environment.resources[loop.index()];
  Budgets* const limited = agreed.target->memory();
  const char* why = nullptr;
  {
    Session session(loop, stream_, resources, limited != nullptr ? *limited : environment.budgets,
                    agreed, cancel, session_options, counters_, placement);
    session_ = &session;
    session_cancel_ = &cancel;
    why = session.run();
    session_ = nullptr;
    session_cancel_ = nullptr;
  }
  resources.buffers().shrink();
  return why;
}

// The connection's fiber waits here meanwhile.
const char* Connection::run_elsewhere(const Environment& environment, const Agreement& agreed,
                                      Placement& placement) {
  base::Event ended;
  std::exception_ptr error;
  const char* why = nullptr;
  const auto visit = [&] {
    try {
      base::CancelSource cancel;
      why = run_session(environment, agreed, cancel, placement);
    } catch (...) {
      error = std::current_exception();
    }
    ended.set();
  };
  bool begun = false;
  try {
    // Who wants it to end asks there from now on.
    away_ = &placement.here();
    begun = !cancel_.cancelled() && away_->post("nbd session", visit);
  } catch (const std::bad_alloc&) {
    base::log_debug("NBD client {}: no memory to change loops", id_);
  }
  if (begun) ended.wait();
  away_ = nullptr;
  if (error) std::rethrow_exception(error);
  if (!begun) placement.stay();
  return begun ? why : run_session(environment, agreed, cancel_, placement);
}

// Whoever withdraws the export either finds this client there, or is found here.
bool Connection::choose(const std::shared_ptr<Export>& target) {
  {
    const std::lock_guard lock(mutex_);
    export_ = target;
  }
  return target == nullptr || !target->withdrawn();
}

void Connection::end_soon() {
  loop_.post("nbd cancel", [self = shared_from_this()] {
    self->cancel_.cancel();
    if (self->away_ == nullptr) {
      self->cancel_session();
    } else {
      // Behind the session's own beginning, if that is on its way.
      try {
        self->away_->post("nbd cancel", [self] { self->cancel_session(); });
      } catch (const std::bad_alloc&) {
        self->cut();
      }
    }
  });
}

// On the session's loop. It may be gone, to where cancel_ is seen.
void Connection::cancel_session() noexcept {
  if (session_ == nullptr) return;
  session_cancel_->cancel();
  session_->on_cancel();
}

bool Connection::entered() const {
  const std::lock_guard lock(mutex_);
  return export_ != nullptr;
}

bool Connection::uses(const Export& target) const {
  const std::lock_guard lock(mutex_);
  return export_.get() == &target || (export_ && export_->origin().get() == &target);
}

std::string Connection::describe() const {
  std::string name;
  {
    const std::lock_guard lock(mutex_);
    if (!export_) return fmt::format("client {} ({}): in the handshake", id_, peer_);
    name = export_->name();
  }
  const uint64_t requests = counters_.requests.load(std::memory_order_relaxed);
  const uint64_t running = in_flight();
  return fmt::format("client {} ({}) of '{}': {} requests in flight, {} done, {} errors", id_,
                     peer_, name, running, requests - std::min(requests, running),
                     counters_.errors.load(std::memory_order_relaxed));
}

}  // namespace minivmm::nbd
