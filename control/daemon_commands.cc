// SPDX-License-Identifier: Apache-2.0
// What the control socket's commands ask of the daemon itself. They run on the socket's loop; what
// takes a while is left to the main thread.
#include <unistd.h>

#include "base/log.h"
#include "control/daemon.h"
#include "control/qmp/message.h"

namespace minivmm::control {

// No guest may come or go meanwhile, so nothing in it may wait.
template <typename Body>
auto Daemon::with_guest(Body&& body) {
  const std::lock_guard lock(guest_mutex_);
  if (!guest_) {
    throw qmp::Failure(config_.boot ? "The guest is being restarted"
                                    : "There is no guest: this is minivmm serve");
  }
  return body(*guest_);
}

void Daemon::emit(std::string_view event, qmp::Json data) {
  if (control_) control_->emit(event, std::move(data));
}

GuestEvents Daemon::guest_events() {
  const auto failed = [this](const std::string& disk, const virtio::FailedRequest& request) {
    // A guest can make requests fail as fast as it likes.
    static base::RateLimit limit(10);
    uint64_t suppressed = 0;
    if (!limit.allow(&suppressed)) return;
    const char* const action = request.action == virtio::ErrorAction::kStop     ? "stop"
                               : request.action == virtio::ErrorAction::kIgnore ? "ignore"
                                                                                : "report";
    emit("BLOCK_IO_ERROR", {{"device", disk},
                            {"node-name", disk},
                            {"operation", request.read ? "read" : "write"},
                            {"action", action},
                            {"nospace", request.no_space},
                            {"reason", request.why}});
  };
  return {
      .stopped = [this] { emit("STOP"); }, .resumed = [this] { emit("RESUME"); }, .failed = failed};
}

std::vector<std::string> Daemon::state() { return state_lines(); }

std::string_view Daemon::guest_status() {
  if (!config_.boot) return {};
  const std::lock_guard lock(guest_mutex_);
  return guest_ ? guest_->status() : "prelaunch";
}

std::vector<std::string> Daemon::guest_disks() {
  std::vector<std::string> out;
  if (!config_.boot) return out;
  for (const Disk& disk : config_.disks) out.push_back(disk.node_name);
  return out;
}

void Daemon::stop_guest() {
  with_guest([](Guest& guest) { (void)guest.hold(); });
}

void Daemon::continue_guest() {
  with_guest([](Guest& guest) { guest.resume(); });
}

void Daemon::reset_guest() {
  with_guest([this](Guest& guest) {
    reset_asked_.store(true);
    guest.machine().stop();
  });
}

void Daemon::quit() {
  quit_asked_.store(true);
  const uint64_t one = 1;
  (void)!::write(asked_.get(), &one, sizeof one);
}

}  // namespace minivmm::control
