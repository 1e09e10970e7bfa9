// SPDX-License-Identifier: Apache-2.0
// The table of drivers.
#pragma once

#include <string>
#include <string_view>

#include <memory>
#include <span>

#include "block/graph/node.h"
#include "block/graph/options.h"

namespace minivmm::block {

class Opening;

// Common to every driver, taken out of the options before it sees them.
struct NodeConfig {
  std::string node_name;
  bool read_only = false;
};

enum class DriverKind { kProtocol, kFormat, kFilter };

struct Driver {
  const char* name;
  DriverKind kind;
  // Fiber; may wait for as long as it takes (a server), which nobody else waits for. Takes what it
  // knows from `options`; the caller reports what is left.
  std::shared_ptr<Node> (*open)(Opening& opening, const NodeConfig& config, Options& options);
};

std::span<const Driver> drivers();
// Throws EINVAL naming the drivers that there are.
const Driver& find_driver(std::string_view name);

}  // namespace minivmm::block
