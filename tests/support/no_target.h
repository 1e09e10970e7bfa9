// SPDX-License-Identifier: Apache-2.0
// A control socket's daemon that has nothing: no graph, no front ends, a guest that only runs.
#pragma once

#include <string>
#include <string_view>

#include <vector>

#include "control/qmp/message.h"
#include "control/qmp/target.h"

namespace minivmm::control::qmp {

class NoTarget : public Target {
 public:
  block::Graph& graph() override { throw Failure("no graph"); }
  FrontEnds& front_ends() override { throw Failure("no front ends"); }
  std::vector<std::string> state() override { return {"a line"}; }
  std::string_view guest_status() override { return "running"; }
  std::vector<std::string> guest_disks() override { return {}; }
  void stop_guest() override {}
  void continue_guest() override {}
  void reset_guest() override {}
  void quit() override {}
};

}  // namespace minivmm::control::qmp
