// SPDX-License-Identifier: Apache-2.0
#include "control/daemon.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include <fmt/core.h>

#include "base/error.h"
#include "base/io_threads.h"
#include "base/log.h"
#include "control/clone_maker.h"
#include "control/side_by_side.h"
#include "control/snapshot.h"
#include "vmm/terminal.h"

namespace minivmm::control {

using block::Permissions;
using std::chrono::milliseconds;
using std::chrono::steady_clock;

namespace {

// The parts share the shutdown timeout; this is for the last flushes.
constexpr std::chrono::seconds kLastFlushes{5};

}  // namespace

Daemon::Daemon(Config config)
    : config_(std::move(config)),
      left_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      unmounted_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

Daemon::~Daemon() = default;

int Daemon::run() {
  pid_file_ = PidFile(config_.pid_file);
  try {
    run_watched([this] {
      start();
      if (config_.ready_fd >= 0) notify_ready_fd(config_.ready_fd);
    });
    started_ = true;
  } catch (...) {
    started_ = true;
    begin_end();
    Outcome outcome;
    run_watched([&] { outcome = take_down(); });
    for (const std::string& line : outcome.problems) base::log_error("{}", line);
    if (!outcome.idle) give_up_now("requests still run");
    throw;
  }
  announce();
  wait_for_end();
  return shut_down();
}

// Runs `body` on a thread of its own and returns when it has ended; throws what it threw. Signals
// are answered meanwhile, and the process is ended if an end takes too long.
void Daemon::run_watched(const std::function<void()>& body) {
  const base::UniqueFd done(::eventfd(0, EFD_CLOEXEC));
  if (!done) throw base::errno_error(errno, "eventfd");
  std::exception_ptr error;
  std::thread worker([&] {
    try {
      body();
    } catch (...) {
      error = std::current_exception();
    }
    const uint64_t one = 1;
    (void)!::write(done.get(), &one, sizeof one);
  });
  pollfd fds[] = {{done.get(), POLLIN, 0}, {signals_.fd(), POLLIN, 0}};
  for (;;) {
    const auto left = std::chrono::ceil<milliseconds>(give_up_ - steady_clock::now());
    const int limit =
        ending_ ? static_cast<int>(std::clamp<int64_t>(left.count(), 0, INT_MAX)) : -1;
    const int ready = ::poll(fds, 2, limit);
    if (ready < 0) continue;  // EINTR
    if ((fds[0].revents & POLLIN) != 0) break;
    if (ready == 0) give_up_now("shutdown timeout");
    take_signal();
  }
  worker.join();
  if (error) std::rethrow_exception(error);
}

void Daemon::begin_end() {
  ending_ = true;
  give_up_ = steady_clock::now() + config_.shutdown_timeout + kLastFlushes;
}

// Only who insists forces an end: the first signal may come while an end is under way already (the
// guest has switched itself off), and SIGHUP comes twice when a terminal is closed.
void Daemon::take_signal() {
  const int number = signals_.take();
  if (number == 0) return;
  if (number == SIGUSR1) {
    if (started_) {
      print_state();
    } else {
      base::log_info("the start has not ended yet");
    }
    return;
  }
  if (number == SIGUSR2) {
    if (started_ && guest_) guest_->resume();
    return;
  }
  if (number != SIGHUP && ++insistent_ == 2) give_up_now("second signal");
  base::log_info("{}: shutting down", ::strsignal(number));
  if (!ending_) begin_end();
}

void Daemon::start() {
  loops_ = std::make_unique<base::LoopGroup>(config_.io_threads, config_.io_backend);
  graph_ = std::make_unique<block::Graph>(config_.open_policy);
  open_nodes();
  make_nbd();
  for (const FuseMount& mount : config_.fuse) {
    mounts_.push_back(std::make_unique<fuse::Mount>(*loops_, mount.directory, mount.options));
    mounts_.back()->on_unmounted([this] {
      const uint64_t one = 1;
      (void)!::write(unmounted_.get(), &one, sizeof one);
    });
  }
  if (config_.boot) {
    serial_port_ =
        std::make_unique<SerialPort>(*loops_, config_.boot->serial, config_.confine_threads);
    Guest::bind_loops(*loops_, *config_.boot);
    make_guest();
  }
  on_loop("publish", [this] {
    for (const Export& wanted : config_.exports) publish(wanted);
  });
  open_fuse();
  open_nbd();
  if (config_.confine_threads) confine();
  if (guest_) guest_->start();
}

void Daemon::make_guest() {
  guest_ = std::make_unique<Guest>(*loops_, *graph_, *serial_port_, *config_.boot, config_.disks,
                                   config_.confine_threads);
}

void Daemon::open_nodes() {
  on_loop("open nodes", [this] {
    for (const block::Options& options : config_.blockdevs) graph_->add(options);
    for (const Disk& disk : config_.disks) {
      if (!disk.notice.empty()) base::log_warning("{}", disk.notice);
      if (disk.snapshot) {
        add_snapshot(*graph_, disk);
      } else {
        graph_->add(disk.node);
      }
    }
  });
}

void Daemon::publish(const Export& wanted) {
  const auto attach = [&](const char* front_end) {
    return graph_->attach(wanted.node_name, fmt::format("{} export '{}'", front_end, wanted.name),
                          Permissions::front_end(wanted.writable));
  };
  if (wanted.clone) {
    // Nobody may write to it while there are clones, or may come to be.
    nbd_->add_clone_export(
        wanted.name,
        graph_->attach(wanted.node_name, fmt::format("NBD clone export '{}'", wanted.name),
                       Permissions::backing()),
        std::make_shared<CloneMaker>(*graph_, wanted),
        {.description = wanted.description,
         .allow = wanted.allow,
         .memory = wanted.in_flight,
         .max_connections = wanted.max_connections});
    return;
  }
  if (wanted.nbd && nbd_) {
    nbd_->add_export(wanted.name, attach("NBD"),
                     {.description = wanted.description,
                      .writable = wanted.writable,
                      .allow = wanted.allow,
                      .multi_conn = config_.nbd_clients != 1,
                      .memory = wanted.in_flight,
                      .max_connections = wanted.max_connections});
  }
  if (wanted.fuse) {
    for (auto& mount : mounts_) {
      mount->add_file(wanted.name, attach("FUSE"), {.writable = wanted.writable});
    }
  }
}

void Daemon::open_fuse() {
  on_loop("mount", [this] {
    for (auto& mount : mounts_) mount->start();
  });
}

void Daemon::make_nbd() {
  if (config_.nbd.empty()) return;
  nbd::ServerOptions options;
  if (config_.nbd_clients != 0) options.max_connections = config_.nbd_clients;
  const bool all_connected =
      std::all_of(config_.nbd.begin(), config_.nbd.end(), [](const NbdListener& each) {
        return each.stdio || (each.fd >= 0 && is_connected_socket(each.fd));
      });
  // Where nobody else can come there is nothing to wait for.
  if (config_.once || all_connected) {
    options.on_last_left = [this, all_connected](bool entered) {
      if (!entered && !all_connected) return;
      const uint64_t one = 1;
      (void)!::write(left_.get(), &one, sizeof one);
    };
  }
  nbd_ = std::make_unique<nbd::Server>(*loops_, options);
}

// True: it was no listener but a client.
bool Daemon::serve_connected(const NbdListener& wanted) {
  if (wanted.stdio) {
    nbd_->serve(take_standard_socket());
    return true;
  }
  if (wanted.fd < 0 || !is_connected_socket(wanted.fd)) return false;
  nbd_->serve(base::UniqueFd(wanted.fd));
  return true;
}

void Daemon::open_nbd() {
  if (!nbd_) return;
  const bool writable = std::any_of(config_.exports.begin(), config_.exports.end(),
                                    [](const Export& e) { return e.writable && e.nbd; });
  on_loop("listen", [&] {
    for (const NbdListener& wanted : config_.nbd) {
      if (serve_connected(wanted)) continue;
      nbd::ListenOptions options;
      options.uri = wanted.uri;
      options.allow_remote = config_.nbd_allow_remote;
      options.tls = wanted.tls;
      options.handshake_limit = wanted.handshake_timeout;
      options.idle_limit = wanted.idle_timeout;
      options.max_connections = wanted.max_connections;
      options.max_per_client = wanted.max_per_client;
      if (wanted.fd >= 0) options.fd.reset(wanted.fd);
      const std::string uri = nbd_->listen(std::move(options));
      if (writable && uri.starts_with("nbd://")) {
        base::log_warning("{}: writable by whoever can reach this TCP port", uri);
      }
    }
  });
}

// All is open. What comes now comes from guests and clients.
void Daemon::confine() {
  base::confine_io_threads();
  for (size_t i = 0; i < loops_->size(); ++i) {
    base::EventLoop& loop = loops_->loop(i);
    loop.call("confine", [&loop] { base::confine_io_thread(base::IoThread::kLoop, loop.name()); });
  }
}

// Two systems that write to one file system destroy it, and what the guest mounts cannot be seen.
void Daemon::warn_of_two_writers() const {
  if (!guest_ || guest_->is_probe()) return;
  for (const Export& wanted : config_.exports) {
    const auto shared = std::find_if(
        config_.disks.begin(), config_.disks.end(),
        [&](const Disk& disk) { return disk.node_name == wanted.node_name && !disk.read_only; });
    if (!wanted.writable || shared == config_.disks.end()) continue;
    base::log_warning(
        "export '{}' is writable, and so is disk '{}' of the guest: while the guest has a file "
        "system on it mounted, a write by anybody else destroys that; leave 'writable' out of "
        "--export to serve the disk read-only",
        wanted.name, shared->node_name);
  }
}

void Daemon::announce() {
  warn_of_two_writers();
  if (nbd_) {
    for (const std::string& uri : nbd_->uris()) base::log_info("NBD export at {}", uri);
  }
  for (const auto& mount : mounts_) {
    for (const Export& wanted : config_.exports) {
      if (wanted.fuse) base::log_info("FUSE file at {}/{}", mount->mountpoint(), wanted.name);
    }
  }
  notify_service_manager("READY=1");
}

void Daemon::wait_for_end() {
  pollfd fds[] = {{signals_.fd(), POLLIN, 0},
                  {unmounted_.get(), POLLIN, 0},
                  {guest_ ? guest_->machine().ended_fd() : -1, POLLIN, 0},
                  {left_.get(), POLLIN, 0}};
  while (!ending_) {
    if (::poll(fds, 4, -1) < 0) continue;  // EINTR
    if ((fds[3].revents & POLLIN) != 0) return;
    if ((fds[2].revents & POLLIN) != 0) {
      if (!restart_guest()) return;
      fds[2].fd = guest_->machine().ended_fd();
      continue;
    }
    if ((fds[1].revents & POLLIN) != 0) {
      uint64_t value = 0;
      (void)!::read(unmounted_.get(), &value, sizeof value);
      base::log_warning(
          "a FUSE mount of ours was unmounted by somebody else; the other front ends "
          "go on");
    }
    if ((fds[0].revents & POLLIN) != 0) take_signal();
  }
}

// True: the guest has reset itself and runs again, on the same disks. Other front ends have gone on
// meanwhile, and so have throw-away overlays and the serial port.
bool Daemon::restart_guest() {
  if (!config_.boot->restart_on_reboot || guest_->machine().wait().kind != vmm::ExitKind::kReset) {
    return false;
  }
  base::log_info("guest: {}; it starts again", guest_->machine().wait().text);
  std::vector<std::string> problems;
  bool idle = true;
  started_ = false;
  try {
    run_watched([&] {
      idle = guest_->stop(config_.shutdown_timeout, problems);
      if (!idle) return;
      guest_.reset();
      if (!problems.empty()) return;
      make_guest();
      guest_->start();
    });
  } catch (const std::exception& e) {
    problems.emplace_back(e.what());
  }
  started_ = true;
  for (const std::string& line : problems)
    base::log_error("the guest cannot start again: {}", line);
  if (!idle) give_up_now("requests still run");
  restart_failed_ = !problems.empty();
  return !restart_failed_;
}

Daemon::Outcome Daemon::take_down() {
  Outcome outcome;
  std::mutex mutex;  // guards outcome while the parts stop
  const auto collect = [&](std::vector<std::string> lines, bool idle) {
    const std::lock_guard lock(mutex);
    outcome.idle = outcome.idle && idle;
    for (std::string& line : lines) outcome.problems.push_back(std::move(line));
  };
  const milliseconds limit = config_.shutdown_timeout;
  std::vector<std::function<void()>> parts;
  if (guest_) {
    parts.emplace_back([&] {
      std::vector<std::string> lines;
      const bool idle = guest_->stop(limit, lines);
      collect(std::move(lines), idle);
    });
  }
  if (nbd_) {
    parts.emplace_back([&] {
      on_loop("stop NBD", [&] { collect(nbd_->stop(base::Clock::now() + limit), true); });
    });
  }
  for (auto& mount : mounts_) {
    parts.emplace_back([&] { on_loop("stop FUSE", [&] { collect(mount->stop(limit), true); }); });
  }
  run_side_by_side(parts);
  if (graph_) on_loop("close graph", [&] { close_graph(outcome); });
  return outcome;
}

// Also where something hangs: what that does not use is flushed and closed.
void Daemon::close_graph(Outcome& outcome) {
  try {
    graph_->close();
  } catch (const std::exception& e) {
    outcome.problems.emplace_back(e.what());
  }
  // What could not be closed is in use by a request that hangs.
  outcome.idle = outcome.idle && graph_->describe().empty();
}

int Daemon::shut_down() {
  notify_service_manager("STOPPING=1");
  begin_end();
  Outcome outcome;
  run_watched([&] { outcome = take_down(); });
  for (const std::string& line : outcome.problems) base::log_error("{}", line);
  if (!outcome.idle) give_up_now("requests still run");
  int status = 0;
  if (guest_) {
    const vmm::ExitReason& reason = guest_->machine().wait();
    if (!reason.text.empty()) base::log_info("guest: {}", reason.text);
    status = reason.exit_status();
  }
  return outcome.problems.empty() && !restart_failed_ ? status : std::max(status, 1);
}

void Daemon::give_up_now(const char* why) {
  if (started_) {
    base::log_error("{}: ending now; what follows was not flushed:", why);
    print_state();
  } else {
    base::log_error("{}: ending now, in the middle of the start", why);
  }
  vmm::restore_terminal();
  pid_file_.remove();
  // Not exit(): destructors would wait for what hangs.
  ::_exit(1);
}

void Daemon::print_state() const {
  std::string text = "minivmm: state\n";
  const auto add = [&](const std::vector<std::string>& lines) {
    for (const std::string& line : lines) text += fmt::format("  {}\n", line);
  };
  if (graph_) add(graph_->describe());
  if (guest_) add(guest_->describe());
  if (nbd_) add(nbd_->describe());
  for (const auto& mount : mounts_) add(mount->describe());
  (void)!::write(STDERR_FILENO, text.data(), text.size());
}

}  // namespace minivmm::control
