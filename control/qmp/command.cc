// SPDX-License-Identifier: Apache-2.0
#include "control/qmp/command.h"

#include <fmt/core.h>

#include "control/qmp/message.h"

namespace minivmm::control::qmp {

std::vector<const Command*> all_commands() {
  std::vector<const Command*> out;
  for (const std::span<const Command> group : {query_commands(), node_commands(), disk_commands(),
                                               export_commands(), process_commands()}) {
    for (const Command& each : group) out.push_back(&each);
  }
  return out;
}

const Command* find_command(std::string_view name) {
  for (const Command* each : all_commands()) {
    if (name == each->name) return each;
  }
  return nullptr;
}

Json run_command(Target& target, std::string_view name, Json arguments) {
  const Command* const command = find_command(name);
  if (command == nullptr) {
    throw Failure(ErrorClass::kCommandNotFound,
                  fmt::format("The command {} has not been found", name));
  }
  const Arguments checked = command->any_arguments
                                ? Arguments(std::move(arguments))
                                : Arguments(command->parameters, std::move(arguments));
  return command->run(target, checked);
}

}  // namespace minivmm::control::qmp
