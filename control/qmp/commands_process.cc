// SPDX-License-Identifier: Apache-2.0
// The guest's and the daemon's life.
#include "control/qmp/command.h"

namespace minivmm::control::qmp {
namespace {

Json stop(Target& target, const Arguments&) {
  target.stop_guest();
  return Json::object();
}

Json cont(Target& target, const Arguments&) {
  target.continue_guest();
  return Json::object();
}

Json system_reset(Target& target, const Arguments&) {
  target.reset_guest();
  return Json::object();
}

Json quit(Target& target, const Arguments&) {
  target.quit();
  return Json::object();
}

constexpr Command kCommands[] = {
    {"cont", {}, cont},
    {"quit", {}, quit},
    {"stop", {}, stop},
    {"system_reset", {}, system_reset},
};

}  // namespace

std::span<const Command> process_commands() { return kCommands; }

}  // namespace minivmm::control::qmp
