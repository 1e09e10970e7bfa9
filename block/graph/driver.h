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

class Graph;

// Common to every driver, taken out of the options before it sees them.
struct NodeConfig {
  std::string node_name;
  bool read_only = false;
};

enum class DriverKind { kProtocol, kFormat, kFilter };

struct Driver {
  const char* name;
  DriverKind kind;
  // Fiber. Takes what it knows from `options`; the caller reports what is left.
  std::shared_ptr<Node> (*open)(Graph& graph, const NodeConfig& config, Options& options);
  // Fiber, before the graph is locked for opening: what may take long and needs no other node (a
  // server that may not answer). Takes what it knows from `options` and attaches what it made to
  // them, for open(). Null: there is nothing of that kind.
  void (*prepare)(Options& options) = nullptr;
};

std::span<const Driver> drivers();
// Throws EINVAL naming the drivers that there are.
const Driver& find_driver(std::string_view name);

}  // namespace minivmm::block
