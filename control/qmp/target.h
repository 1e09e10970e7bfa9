// SPDX-License-Identifier: Apache-2.0
// What commands act on: the daemon, as they see it. Its methods run on fibers and may wait, unless
// they say otherwise.
#pragma once

#include <string>
#include <string_view>

#include <vector>

#include "block/graph/graph.h"
#include "control/front_ends.h"
#include "control/qmp/node_locks.h"

namespace minivmm::control::qmp {

class Target {
 public:
  virtual ~Target() = default;
  virtual block::Graph& graph() = 0;
  virtual FrontEnds& front_ends() = 0;
  // Held by commands that change what is inside a node.
  NodeLocks& changing() noexcept { return changing_; }
  // What SIGUSR1 prints.
  virtual std::vector<std::string> state() = 0;

  // QMP's word for what the guest does ("running", "paused", "io-error", ...); empty: there is no
  // guest. Never waits.
  virtual std::string_view guest_status() = 0;
  // The nodes that are the guest's disks.
  virtual std::vector<std::string> guest_disks() = 0;
  // They return at once. Throw Failure where there is no guest.
  virtual void stop_guest() = 0;
  virtual void continue_guest() = 0;
  virtual void reset_guest() = 0;
  // The daemon's end begins.
  virtual void quit() = 0;

 private:
  NodeLocks changing_;
};

}  // namespace minivmm::control::qmp
