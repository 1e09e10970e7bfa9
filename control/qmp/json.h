// SPDX-License-Identifier: Apache-2.0
// The JSON library, for the control socket's messages. Reading and writing recurse no deeper than
// kMostDepth of splitter.h, because they run on fibers.
#pragma once

#include <nlohmann/json.hpp>

namespace minivmm::control::qmp {

using Json = nlohmann::ordered_json;

}  // namespace minivmm::control::qmp
