// SPDX-License-Identifier: Apache-2.0
// The commands: a table of names, arguments and functions. One file a group of them.
#pragma once

#include <string_view>

#include <span>
#include <vector>

#include "block/graph/snapshots.h"
#include "control/qmp/arguments.h"
#include "control/qmp/json.h"
#include "control/qmp/target.h"

namespace minivmm::control::qmp {

struct Command {
  const char* name;
  std::span<const Parameter> parameters;
  // On a fiber of the socket's loop. Returns what `return` holds; throws Failure or base::Error.
  Json (*run)(Target& target, const Arguments& arguments);
  // Anything is taken, and the function looks at it.
  bool any_arguments = false;
};

// Those of a file each.
std::span<const Command> query_commands();
std::span<const Command> node_commands();
std::span<const Command> disk_commands();
std::span<const Command> export_commands();
std::span<const Command> process_commands();

// QMP's SnapshotInfo.
Json snapshot_json(const block::Snapshots::Info& info);

std::vector<const Command*> all_commands();
const Command* find_command(std::string_view name);

// Checks the arguments and runs it. Throws as Command::run; Failure for what there is not.
Json run_command(Target& target, std::string_view name, Json arguments);

}  // namespace minivmm::control::qmp
