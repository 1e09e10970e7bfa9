// SPDX-License-Identifier: Apache-2.0
#include "control/daemon.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::control {

using base::Error;
using block::Permissions;

Daemon::Daemon(Config config)
    : config_(std::move(config)), unmounted_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

Daemon::~Daemon() = default;

int Daemon::run() {
  pid_file_ = PidFile(config_.pid_file);
  try {
    start();
    if (config_.ready_fd >= 0) notify_ready_fd(config_.ready_fd);
  } catch (...) {
    const Outcome outcome = take_down();
    for (const std::string& line : outcome.problems) base::log_error("{}", line);
    if (!outcome.idle) give_up_now("requests still run");
    throw;
  }
  announce();
  wait_for_end();
  return shut_down();
}

void Daemon::start() {
  loops_ = std::make_unique<base::LoopGroup>(config_.io_threads, config_.io_backend);
  graph_ = std::make_unique<block::Graph>(config_.open_policy);
  open_nodes();
  if (!config_.nbd.empty()) nbd_ = std::make_unique<nbd::Server>(*loops_);
  for (const FuseMount& mount : config_.fuse) {
    mounts_.push_back(std::make_unique<fuse::Mount>(*loops_, mount.directory, mount.options));
    mounts_.back()->on_unmounted([this] {
      const uint64_t one = 1;
      (void)!::write(unmounted_.get(), &one, sizeof one);
    });
  }
  if (config_.boot) {
    guest_ = std::make_unique<Guest>(*loops_, *graph_, *config_.boot, config_.disks);
  }
  on_loop("publish", [this] {
    for (const Export& wanted : config_.exports) publish(wanted);
  });
  open_fuse();
  open_nbd();
  if (guest_) guest_->start();
}

void Daemon::open_nodes() {
  on_loop("open nodes", [this] {
    for (const block::Options& options : config_.blockdevs) graph_->add(options);
    for (const Disk& disk : config_.disks) {
      if (!disk.notice.empty()) base::log_warning("{}", disk.notice);
      graph_->add(disk.node);
    }
  });
}

void Daemon::publish(const Export& wanted) {
  const auto attach = [&](const char* front_end) {
    return graph_->attach(wanted.node_name, fmt::format("{} export '{}'", front_end, wanted.name),
                          Permissions::front_end(wanted.writable));
  };
  if (wanted.nbd && nbd_) {
    nbd_->add_export(wanted.name, attach("NBD"),
                     {.description = wanted.description, .writable = wanted.writable});
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

void Daemon::open_nbd() {
  if (!nbd_) return;
  const bool writable = std::any_of(config_.exports.begin(), config_.exports.end(),
                                    [](const Export& e) { return e.writable && e.nbd; });
  on_loop("listen", [&] {
    for (const NbdListener& wanted : config_.nbd) {
      nbd::ListenOptions options;
      options.uri = wanted.uri;
      options.allow_remote = config_.nbd_allow_remote;
      if (wanted.fd >= 0) options.fd.reset(wanted.fd);
      const std::string uri = nbd_->listen(std::move(options));
      if (writable && uri.starts_with("nbd://")) {
        base::log_warning("{}: writable by whoever can reach this TCP port", uri);
      }
    }
  });
}

void Daemon::announce() {
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
                  {guest_ ? guest_->machine().ended_fd() : -1, POLLIN, 0}};
  for (;;) {
    if (::poll(fds, 3, -1) < 0 && errno != EINTR) throw base::errno_error(errno, "poll");
    if ((fds[2].revents & POLLIN) != 0) return;
    if ((fds[1].revents & POLLIN) != 0) {
      uint64_t value = 0;
      (void)!::read(unmounted_.get(), &value, sizeof value);
      base::log_warning(
          "a FUSE mount of ours was unmounted by somebody else; the other front ends "
          "go on");
    }
    if ((fds[0].revents & POLLIN) == 0) continue;
    const int number = signals_.take();
    if (number == SIGUSR1) {
      print_state();
    } else if (number != 0) {
      base::log_info("{}: shutting down", ::strsignal(number));
      return;
    }
  }
}

Daemon::Outcome Daemon::take_down() {
  Outcome outcome;
  const auto until = base::Clock::now() + config_.shutdown_timeout;
  const auto left = [&] {
    return std::max(
        std::chrono::milliseconds(0),
        std::chrono::duration_cast<std::chrono::milliseconds>(until - base::Clock::now()));
  };
  const auto collect = [&](std::vector<std::string> lines) {
    for (std::string& line : lines) outcome.problems.push_back(std::move(line));
  };
  if (guest_) outcome.idle = guest_->stop(left(), outcome.problems);
  if (nbd_) on_loop("stop NBD", [&] { collect(nbd_->stop(until)); });
  for (auto& mount : mounts_) on_loop("stop FUSE", [&] { collect(mount->stop(left())); });
  if (graph_ && outcome.idle) {
    on_loop("close graph", [&] {
      try {
        graph_->close();
      } catch (const std::exception& e) {
        outcome.problems.emplace_back(e.what());
      }
      // What could not be closed is in use by a request that hangs.
      outcome.idle = graph_->describe().empty();
    });
  }
  return outcome;
}

int Daemon::shut_down() {
  notify_service_manager("STOPPING=1");
  // Whatever may wait for a device runs beside this thread, which keeps watching for a second
  // signal and the time.
  Outcome outcome;
  const base::UniqueFd done(::eventfd(0, EFD_CLOEXEC));
  std::thread worker([&] {
    outcome = take_down();
    const uint64_t one = 1;
    (void)!::write(done.get(), &one, sizeof one);
  });
  // The parts share the timeout; what is left beyond it is for the last flushes.
  const auto give_up =
      std::chrono::steady_clock::now() + config_.shutdown_timeout + std::chrono::seconds(5);
  pollfd fds[] = {{done.get(), POLLIN, 0}, {signals_.fd(), POLLIN, 0}};
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        give_up - std::chrono::steady_clock::now());
    const int ready = ::poll(fds, 2, static_cast<int>(std::max<int64_t>(left.count(), 0)));
    if ((fds[0].revents & POLLIN) != 0) break;
    const int number = (fds[1].revents & POLLIN) != 0 ? signals_.take() : 0;
    if (number == SIGUSR1) {
      print_state();
    } else if (number != 0 || ready == 0) {
      give_up_now(number != 0 ? "second signal" : "shutdown timeout");
    }
  }
  worker.join();
  for (const std::string& line : outcome.problems) base::log_error("{}", line);
  if (!outcome.idle) give_up_now("requests still run");
  int status = 0;
  if (guest_) {
    const vmm::ExitReason& reason = guest_->machine().wait();
    if (!reason.text.empty()) base::log_info("guest: {}", reason.text);
    status = reason.exit_status();
  }
  return outcome.problems.empty() ? status : std::max(status, 1);
}

void Daemon::give_up_now(const char* why) const {
  base::log_error("{}: ending now; what follows was not flushed:", why);
  print_state();
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
