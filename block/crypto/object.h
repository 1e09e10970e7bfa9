// SPDX-License-Identifier: Apache-2.0
// The value of --object, of whatever type: "secret,id=...", "tls-creds-psk,id=...", or JSON with
// "qom-type".
#pragma once

#include <string>
#include <string_view>

#include "block/graph/options.h"

namespace minivmm::block::crypto {

struct ObjectText {
  std::string type;
  Options options;  // behind the type
};
// Pure. Throws EINVAL.
ObjectText parse_object(std::string_view text);

// Adds it to the process's secrets() or tls_objects(). Not on a fiber: it may read files.
void add_object(std::string_view text);

}  // namespace minivmm::block::crypto
