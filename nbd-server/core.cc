// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/core.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <thread>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "base/io.h"
#include "base/log.h"
#include "base/pool.h"
#include "block/graph/lent.h"
#include "nbd-server/wire.h"

namespace minivmm::nbd {
namespace {

static_assert(kMinClientMemory > wire::kMaxPayload);
// What clients that were cut off get to notice it.
constexpr auto kAfterCut = std::chrono::milliseconds(200);

ServerOptions sane(ServerOptions options) noexcept {
  options.connection_memory = std::max(options.connection_memory, kMinClientMemory);
  options.memory = std::max(options.memory, kMinMemory);
  options.max_connections = std::max(options.max_connections, 1u);
  options.max_handshakes = std::max(options.max_handshakes, 1u);
  return options;
}

// Fiber.
void forget_lent() noexcept {
  try {
    base::Pool::syscalls().run([] { block::forget_lent(); });
  } catch (const std::exception&) {
    // There is no thread for it: it stays until the next client has left.
  }
}

}  // namespace

Server::Core::Core(base::LoopGroup& loops, ServerOptions options)
    : loops_(loops), options_(sane(std::move(options))), budgets_(options_.memory), kept_(*this) {
  for (size_t i = 0; i < loops.size(); ++i) {
    resources_[loops.loop(i).index()] = std::make_unique<Resources>(kept_);
  }
}

// --- memory ---

bool Server::Core::Kept::too_much() const noexcept {
  return core_.budgets_.used() + core_.budgets_.set_aside() + bytes() > core_.budgets_.total();
}

// On behalf of a client, so that the core is there.
void Server::Core::Kept::trim_all() noexcept {
  if (trimming_.exchange(true, std::memory_order_relaxed)) return;
  try {
    for (size_t i = 0; i < core_.loops_.size(); ++i) {
      base::EventLoop& loop = core_.loops_.loop(i);
      loop.post("nbd trim", [core = core_.shared_from_this(), &loop] {
        core->resources_[loop.index()]->buffers().trim();
        core->kept_.trimming_.store(false, std::memory_order_relaxed);
      });
    }
  } catch (const std::bad_alloc&) {
    trimming_.store(false, std::memory_order_relaxed);
  }
}

// --- exports ---

void Server::Core::add_export(std::shared_ptr<Export> added) {
  added->limit_memory(budgets_);
  exports_.add(std::move(added));
  warn_if_open_to_writers();
}

void Server::Core::remove_export(const std::string& name, base::Clock::time_point deadline,
                                 bool only_unused) {
  const std::shared_ptr<Export> target = exports_.remove(name, only_unused);
  if (!target) throw base::Error(ENOENT, fmt::format("there is no NBD export '{}'", name));
  target->withdraw();
  for (const auto& client : clients_of(*target)) client->end_soon();
  if (!target->wait_unused(deadline)) {
    for (const auto& client : clients_of(*target)) client->cut();
    if (!target->wait_unused(base::Clock::now() + kAfterCut)) {
      // The handle goes with the last request.
      std::string users;
      for (const auto& client : clients_of(*target)) users += "; " + client->describe();
      throw base::Error(ETIMEDOUT, fmt::format("NBD export '{}' was withdrawn, but it is in use "
                                               "still and closes when that ends{}",
                                               name, users));
    }
  }
  close_export(target, deadline);
}

// Nobody uses it any more. Throws what closing throws, or ETIMEDOUT: then it goes on by itself.
void Server::Core::close_export(const std::shared_ptr<Export>& target,
                                base::Clock::time_point deadline) {
  struct Step {
    base::Event done;
    std::exception_ptr error;
  };
  const auto step = std::make_shared<Step>();
  base::EventLoop::current()->spawn("nbd close", [target, step] {
    try {
      target->close();
    } catch (...) {
      step->error = std::current_exception();
    }
    step->done.set();
  });
  if (!step->done.wait_until(std::max(deadline, base::Clock::now() + kAfterCut))) {
    throw base::Error(ETIMEDOUT,
                      fmt::format("NBD export '{}': flushing has not ended", target->name()));
  }
  if (step->error) std::rethrow_exception(step->error);
}

void Server::Core::warn_if_open_to_writers() const {
  std::string addresses;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& each : listeners_) {
      if (each->socket.tcp && each->terms.security.mode != TlsOptions::Mode::kRequired)
        addresses.append(1, ' ').append(each->socket.address.text());
    }
  }
  if (addresses.empty()) return;
  for (const auto& each : exports_.all()) {
    if (!each->writable() || each->cloned()) continue;
    base::log_warning(
        "NBD export '{}' can be written by everybody who reaches{}: NBD over TCP asks "
        "for no password",
        each->name(), addresses);
  }
}

// --- listeners ---

std::string Server::Core::listen(ListenOptions options) {
  auto listener = std::make_shared<Listener>();
  const bool encrypted = options.tls.mode == TlsOptions::Mode::kRequired;
  if (options.tls.mode != TlsOptions::Mode::kOff) {
    listener->terms.security.mode = options.tls.mode;
    listener->terms.security.credentials = base::Pool::errands().run(
        [&] { return std::make_shared<const TlsCredentials>(options.tls); });
  }
  if (options.fd) {
    listener->socket = adopt(std::move(options.fd));
  } else {
    const Uri uri = parse_uri(options.uri);
    if (!uri.export_name.empty()) {
      throw base::Error(EINVAL, fmt::format("{}: an address to listen on has no export name; "
                                            "exports bring their own",
                                            options.uri));
    }
    const bool allow_remote = options.allow_remote || encrypted;
    listener->socket = uri.is_unix()    ? bind_unix(uri.socket_path)
                       : uri.is_vsock() ? bind_vsock(uri, allow_remote)
                                        : bind_tcp(uri, allow_remote);
  }
  listener->socket.address.tls = encrypted;
  listener->terms.handshake_limit = options.handshake_limit;
  listener->terms.idle_limit = options.idle_limit;
  listener->terms.listener = listener.get();
  listener->max_connections = options.max_connections;
  listener->max_per_client = options.max_per_client;
  listener->loop = &loops_.next();
  const std::string address = listener->socket.address.text();
  {
    const std::lock_guard lock(mutex_);
    if (closed_ || !listeners_inside_.enter()) {
      throw base::Error(ESHUTDOWN, "the NBD server is shutting down");
    }
    listeners_.push_back(listener);
  }
  listener->loop->post("nbd listener", [self = shared_from_this(), listener] {
    self->accept_clients(*listener);
    self->listeners_inside_.leave();
  });
  warn_if_open_to_writers();
  return address;
}

void Server::Core::accept_clients(Listener& listener) {
  constexpr auto kWhenFull = std::chrono::milliseconds(50);
  const int fd = listener.socket.fd.get();
  while (!listener.cancel.cancelled()) {
    if (full(listener)) {
      (void)base::io::sleep_for(kWhenFull, &listener.cancel);
      continue;
    }
    if (base::io::poll(fd, POLLIN, &listener.cancel) < 0) continue;
    accept_ready(listener);
  }
}

void Server::Core::accept_ready(Listener& listener) {
  while (!full(listener) && !listener.cancel.cancelled()) {
    const int fd =
        ::accept4(listener.socket.fd.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) {
      serve(base::UniqueFd(fd), listener.terms, listener.max_per_client);
      continue;
    }
    const int err = errno;
    if (err == EINTR || err == ECONNABORTED) continue;
    if (err == EAGAIN) return;
    // Out of descriptors or memory: those who wait stay in the backlog.
    static base::RateLimit limit(1);
    uint64_t suppressed = 0;
    if (limit.allow(&suppressed)) {
      base::log_warning("{}: cannot accept a client: {}", listener.socket.address.text(),
                        base::errno_text(err));
    }
    (void)base::io::sleep_for(std::chrono::milliseconds(100), &listener.cancel);
    return;
  }
}

void Server::Core::close_listeners() {
  std::vector<std::shared_ptr<Listener>> closing;
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    closing.swap(listeners_);
  }
  for (const auto& each : closing) {
    each->loop->post("nbd cancel", [each] {
      // The socket's file goes first, so that nobody finds a socket that does not answer.
      base::Pool::errands().run([&] { each->socket.file.remove(); });
      each->cancel.cancel();
    });
  }
}

std::vector<std::string> Server::Core::uris() const {
  std::vector<std::string> out;
  const auto exports = exports_.all();
  const std::lock_guard lock(mutex_);
  for (const auto& listener : listeners_) {
    for (const auto& each : exports) {
      Uri uri = listener->socket.address;
      uri.export_name = each->name();
      out.push_back(uri.text());
    }
  }
  return out;
}

// --- clients ---

// Under mutex_: whether there is a place for this client; one that has not begun to use anything
// may have to make room for it.
bool Server::Core::admits(const Connection& client, unsigned max_per_client) {
  unsigned handshakes = 0;
  unsigned own = 0;
  Connection* oldest = nullptr;
  for (const auto& entry : clients_) {
    Connection& each = *entry.second;
    if (each.key() == client.key() && each.listener() == client.listener()) ++own;
    if (!each.in_handshake()) continue;
    ++handshakes;
    if (oldest == nullptr) oldest = &each;
  }
  static base::RateLimit limit(1);
  uint64_t suppressed = 0;
  if (max_per_client > 0 && own >= max_per_client && !client.key().empty()) {
    if (limit.allow(&suppressed)) {
      base::log_warning("NBD: {} has {} connections already, more are refused", client.key(), own);
    }
    return false;
  }
  if (handshakes >= options_.max_handshakes) {
    if (limit.allow(&suppressed)) {
      base::log_warning("NBD: {} clients are in the handshake: the oldest is cut off", handshakes);
    }
    oldest->cut();
  }
  return true;
}

void Server::Core::serve(base::UniqueFd connected, Connection::Terms terms,
                         unsigned max_per_client) {
  base::EventLoop& loop = loops_.next();
  std::shared_ptr<Connection> client;
  {
    const std::lock_guard lock(mutex_);
    if (closed_ || !clients_inside_.enter()) return;
    try {
      client = std::make_shared<Connection>(next_id_, loop, std::move(connected), std::move(terms));
      if (!admits(*client, max_per_client)) {
        clients_inside_.leave();
        return;
      }
      clients_.emplace(next_id_++, client);
    } catch (...) {
      clients_inside_.leave();
      throw;
    }
  }
  loop.post("nbd client", [self = shared_from_this(), client]() mutable {
    const bool last = self->run_client(*client);
    // The socket is closed before whoever waits for the clients' end goes on.
    client.reset();
    if (last) forget_lent();
    self->clients_inside_.leave();
  });
}

// Half of the processors are the clients'. Where there are not more loops than that, none is
// shared.
base::EventLoop* Server::Core::shared_loop(uint64_t client) noexcept {
  const size_t most =
      options_.shared_loops > 0 ? options_.shared_loops : std::thread::hardware_concurrency() / 2;
  const size_t shared = std::max<size_t>(most, 1);
  return shared < loops_.size() ? &loops_.loop(client % shared) : nullptr;
}

bool Server::Core::run_client(Connection& client) {
  client.run({options_, exports_, resources_, budgets_, shared_loop(client.id())});
  bool last = false;
  {
    const std::lock_guard lock(mutex_);
    clients_.erase(client.id());
    last = clients_.empty();
  }
  if (last && kept_.bytes() > KeptBuffers::kAlways) kept_.trim_all();
  if (last && options_.on_last_left) options_.on_last_left(client.entered());
  return last;
}

bool Server::Core::full(const Listener& listener) const {
  const std::lock_guard lock(mutex_);
  if (clients_.size() >= options_.max_connections) return true;
  if (listener.max_connections == 0) return false;
  const auto own = std::count_if(clients_.begin(), clients_.end(), [&](const auto& entry) {
    return entry.second->listener() == &listener;
  });
  return own >= listener.max_connections;
}

Server::Core::Clients Server::Core::clients() const {
  const std::lock_guard lock(mutex_);
  Clients out;
  for (const auto& entry : clients_) out.push_back(entry.second);
  return out;
}

Server::Core::Clients Server::Core::clients_of(const Export& target) const {
  Clients out = clients();
  std::erase_if(out, [&target](const auto& client) { return !client->uses(target); });
  return out;
}

// --- the end ---

std::vector<std::string> Server::Core::stop(base::Clock::time_point deadline) {
  close_listeners();
  for (const auto& client : clients()) client->end_soon();
  std::vector<std::string> unfinished;
  if (!clients_inside_.close_until(deadline)) {
    for (const auto& client : clients()) client->cut();
    if (!clients_inside_.close_until(base::Clock::now() + kAfterCut)) {
      for (const auto& client : clients()) {
        unfinished.push_back("NBD " + client->describe() + ", cut off");
      }
    }
  }
  listeners_inside_.close();
  for (const auto& each : exports_.close()) {
    each->withdraw();
    // Where somebody is stuck inside, the handle goes with the last request.
    if (!each->wait_unused(base::Clock::now() + kAfterCut)) continue;
    try {
      close_export(each, deadline);
    } catch (const std::exception& e) {
      unfinished.push_back(
          fmt::format("NBD export '{}' was not closed cleanly: {}", each->name(), e.what()));
    }
  }
  return unfinished;
}

void Server::Core::abandon() noexcept {
  try {
    close_listeners();
    for (const auto& client : clients()) {
      client->end_soon();
      client->cut();
    }
    for (const auto& each : exports_.close()) each->withdraw();
  } catch (const std::exception& e) {
    base::log_error("NBD server: {}", e.what());
  }
}

std::vector<std::string> Server::Core::describe() const {
  std::vector<std::string> out;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& each : listeners_) {
      out.push_back(fmt::format("NBD listens on {}", each->socket.address.text()));
    }
  }
  for (const auto& each : exports_.all()) out.push_back(each->describe());
  for (const auto& client : clients()) out.push_back("NBD " + client->describe());
  out.push_back(
      fmt::format("NBD payload memory: {} of {} bytes", budgets_.used(), budgets_.total()));
  return out;
}

}  // namespace minivmm::nbd
