// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/connection.h"

#include <algorithm>

#include <fmt/core.h>

#include "base/log.h"

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

  const SessionOptions session_options{.idle_limit = terms_.idle_limit.value_or(options.idle_limit),
                                       .stall_limit = options.stall_limit,
                                       .memory = options.connection_memory};
  Budgets* const limited = agreed->target->memory();
  Session session(loop_, stream_, environment.resources,
                  limited != nullptr ? *limited : environment.budgets, *agreed, cancel_,
                  session_options, counters_);
  session_ = &session;
  const char* const why = session.run();
  session_ = nullptr;
  return why;
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
    if (self->session_ != nullptr) self->session_->on_cancel();
  });
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
