// SPDX-License-Identifier: Apache-2.0
// What a user types for a control command, as JSON: qmp-shell's habits, helped by what is known of
// the command's arguments.
#pragma once

#include <string>

#include <vector>

#include "control/qmp/json.h"

namespace minivmm::cli {

// {"execute": COMMAND, "arguments": {...}} of "COMMAND", "key=value", ... A dotted key makes
// objects. A value is text where the command takes text, a number with or without K, M, G, T where
// it takes one; otherwise what JSON it is, and text where it is none. A single word that begins
// with '{' is all arguments, or the whole message where it stands in place of the command. Throws
// base::Error.
control::qmp::Json control_message(const std::vector<std::string>& words);

// A line as a shell would cut it up: blanks, quotes, backslashes. Throws base::Error.
std::vector<std::string> control_line_words(const std::string& line);

// "block_resize [device=TEXT] [node-name=TEXT] size=NUMBER", a line each.
std::string control_command_list();

}  // namespace minivmm::cli
