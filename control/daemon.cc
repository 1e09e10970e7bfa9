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
#include <latch>
#include <mutex>
#include <thread>

#include <fmt/core.h>

#include "base/error.h"
#include "base/io_threads.h"
#include "base/log.h"
#include "control/side_by_side.h"
#include "control/snapshot.h"
#include "vmm/terminal.h"

namespace minivmm::control {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

namespace {

// The parts share the shutdown timeout; this is for the last flushes.
constexpr std::chrono::seconds kLastFlushes{5};

void signal_event(const base::UniqueFd& fd) noexcept {
  const uint64_t one = 1;
  (void)!::write(fd.get(), &one, sizeof one);
}

void take_event(const base::UniqueFd& fd) noexcept {
  uint64_t value = 0;
  (void)!::read(fd.get(), &value, sizeof value);
}

}  // namespace

Daemon::Daemon(Config config)
    : config_(std::move(config)),
      left_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      unmounted_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      asked_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

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
    signal_event(done);
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
  // First, because whatever comes up later may have something to tell.
  if (!config_.control_socket.empty()) {
    control_ = std::make_shared<qmp::Server>(loops_->loop(0), static_cast<qmp::Target&>(*this));
  }
  graph_ = std::make_unique<block::Graph>(config_.open_policy);
  graph_->set_corruption_listener(
      [this](const std::string& node_name, const std::string& text, bool fatal) {
        emit("BLOCK_IMAGE_CORRUPTED",
             {{"device", ""}, {"node-name", node_name}, {"msg", text}, {"fatal", fatal}});
      });
  open_nodes();
  make_front_ends();
  if (config_.boot) {
    serial_port_ =
        std::make_unique<SerialPort>(*loops_, config_.boot->serial, config_.confine_threads);
    Guest::bind_loops(*loops_, *config_.boot);
    make_guest();
  }
  on_loop("open front ends", [this] {
    front_ends_->publish_configured();
    front_ends_->open();
  });
  if (control_) bind_control_socket();
  if (config_.confine_threads) confine();
  if (guest_) guest_->start();
  if (control_) control_->start();
}

void Daemon::make_front_ends() {
  front_ends_ = std::make_unique<FrontEnds>(
      *loops_, *graph_, config_,
      FrontEnds::Callbacks{.last_client_left = [this] { signal_event(left_); },
                           .unmounted = [this] { signal_event(unmounted_); },
                           .export_deleted =
                               [this](const std::string& id) {
                                 emit("BLOCK_EXPORT_DELETED", {{"id", id}});
                               }});
}

void Daemon::bind_control_socket() {
  on_loop("control socket", [this] { control_->bind(config_.control_socket); });
}

void Daemon::make_guest() {
  auto made = std::make_unique<Guest>(*loops_, *graph_, *serial_port_, *config_.boot, config_.disks,
                                      config_.confine_threads, guest_events());
  const std::lock_guard lock(guest_mutex_);
  guest_ = std::move(made);
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

// All is open. What comes now comes from guests and clients.
void Daemon::confine() {
  base::confine_io_threads();
  std::latch confined(static_cast<ptrdiff_t>(loops_->size()));
  for (size_t i = 0; i < loops_->size(); ++i) {
    base::EventLoop& loop = loops_->loop(i);
    loop.post("confine", [&] {
      base::confine_io_thread(base::IoThread::kLoop, loop.name());
      confined.count_down();
    });
  }
  confined.wait();
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
  for (const std::string& uri : front_ends_->uris()) base::log_info("NBD export at {}", uri);
  for (const std::string& directory : front_ends_->mountpoints()) {
    for (const Export& wanted : config_.exports) {
      if (wanted.fuse) base::log_info("FUSE file at {}/{}", directory, wanted.name);
    }
  }
  if (control_) base::log_info("control socket at {}", control_->path());
  notify_service_manager("READY=1");
}

// What a command of the control socket left for this thread.
void Daemon::take_request() {
  take_event(asked_);
  if (quit_asked_.load()) {
    base::log_info("asked to end by the control socket");
    end_reason_ = "host-qmp-quit";
    if (!ending_) begin_end();
  }
}

void Daemon::wait_for_end() {
  pollfd fds[] = {{signals_.fd(), POLLIN, 0},
                  {unmounted_.get(), POLLIN, 0},
                  {guest_ ? guest_->machine().ended_fd() : -1, POLLIN, 0},
                  {left_.get(), POLLIN, 0},
                  {asked_.get(), POLLIN, 0}};
  while (!ending_) {
    if (::poll(fds, 5, -1) < 0) continue;  // EINTR
    if ((fds[3].revents & POLLIN) != 0) return;
    if ((fds[2].revents & POLLIN) != 0) {
      if (!guest_ended()) return;
      fds[2].fd = guest_->machine().ended_fd();
      continue;
    }
    if ((fds[1].revents & POLLIN) != 0) {
      take_event(unmounted_);
      base::log_warning(
          "a FUSE mount of ours was unmounted by somebody else; the other front ends "
          "go on");
    }
    if ((fds[4].revents & POLLIN) != 0) take_request();
    if ((fds[0].revents & POLLIN) != 0) take_signal();
  }
}

// True: it runs again, because it has reset itself, or a command did.
bool Daemon::guest_ended() {
  const vmm::ExitReason& reason = guest_->machine().wait();
  const bool asked = reset_asked_.exchange(false);
  const bool itself = reason.kind == vmm::ExitKind::kReset;
  end_reason_ = itself                                         ? "guest-reset"
                : reason.kind == vmm::ExitKind::kCrash         ? "guest-panic"
                : reason.kind == vmm::ExitKind::kInternalError ? "host-error"
                                                               : "guest-shutdown";
  if (!asked && !(itself && config_.boot->restart_on_reboot)) return false;
  uint64_t suppressed = 0;
  if (restarts_told_.allow(&suppressed)) {
    base::log_info("guest: {}; it starts again{}", reason.text,
                   suppressed == 0 ? "" : fmt::format(" ({} more not shown)", suppressed));
  }
  if (!restart_guest()) return false;
  emit("RESET", {{"guest", itself}, {"reason", itself ? end_reason_ : "host-qmp-system-reset"}});
  end_reason_ = "host-signal";
  return true;
}

// On the same disks. Other front ends go on meanwhile, and so do throw-away overlays and the serial
// port. False: it could not be.
bool Daemon::restart_guest() {
  std::vector<std::string> problems;
  bool idle = true;
  const bool held = guest_->machine().paused();
  started_ = false;
  try {
    run_watched([&] {
      idle = guest_->stop(config_.shutdown_timeout, problems);
      if (!idle) return;
      std::unique_ptr<Guest> last;
      {
        const std::lock_guard lock(guest_mutex_);
        last = std::move(guest_);
      }
      last.reset();
      if (!problems.empty()) return;
      make_guest();
      if (held) guest_->machine().pause();
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

// Commands may use whatever comes down later, so they come first; but one that hangs is not to cost
// the clients their flushes, and is waited for again at the end.
void Daemon::stop_control_socket() {
  static constexpr std::string_view kOfGuest = "guest";
  emit("SHUTDOWN",
       {{"guest", std::string_view(end_reason_).starts_with(kOfGuest)}, {"reason", end_reason_}});
  (void)commands_under_way();
}

// What still runs after half of the time that an end may take.
std::vector<std::string> Daemon::commands_under_way() {
  const auto until = base::Clock::now() + config_.shutdown_timeout / 2;
  return loops_->loop(0).call("stop the control socket", [&] { return control_->stop(until); });
}

Daemon::Outcome Daemon::take_down() {
  Outcome outcome;
  // A command that opens a node may wait for a server that does not answer.
  if (graph_) on_loop("end openings", [this] { graph_->end_openings(); });
  if (control_) stop_control_socket();
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
  if (front_ends_) {
    front_ends_->add_stops(
        parts, limit, [&](std::vector<std::string> lines) { collect(std::move(lines), true); });
  }
  run_side_by_side(parts);
  if (control_) {
    std::vector<std::string> left = commands_under_way();
    const bool idle = left.empty();
    collect(std::move(left), idle);
  }
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

std::vector<std::string> Daemon::state_lines() const {
  std::vector<std::string> out;
  const auto add = [&](std::vector<std::string> lines) {
    for (std::string& line : lines) out.push_back(std::move(line));
  };
  if (graph_) add(graph_->describe());
  {
    const std::lock_guard lock(guest_mutex_);
    if (guest_) add(guest_->describe());
  }
  if (front_ends_) add(front_ends_->describe());
  return out;
}

void Daemon::print_state() const {
  std::string text = "minivmm: state\n";
  for (const std::string& line : state_lines()) text += fmt::format("  {}\n", line);
  (void)!::write(STDERR_FILENO, text.data(), text.size());
}

}  // namespace minivmm::control
