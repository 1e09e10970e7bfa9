// SPDX-License-Identifier: Apache-2.0
// What the control socket's commands ask of the daemon itself. They run on the socket's loop; what
// takes a while is left to the main thread.
#include <unistd.h>

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

std::vector<std::string> Daemon::state() { return state_lines(); }

std::string_view Daemon::guest_status() {
  if (!config_.boot) return {};
  const std::lock_guard lock(guest_mutex_);
  return guest_ ? guest_->status() : "prelaunch";
}

void Daemon::stop_guest() {
  if (with_guest([](Guest& guest) { return guest.hold(); })) emit("STOP");
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
