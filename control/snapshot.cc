// SPDX-License-Identifier: Apache-2.0
#include "control/snapshot.h"

#include <string>

#include <fmt/core.h>

#include "control/overlay.h"

namespace minivmm::control {

void add_snapshot(block::Graph& graph, const Disk& disk) {
  const std::string& name = disk.node_name;
  block::Options base = disk.node;
  (void)base.take_string("node-name");
  base.set("node-name", name + ".base");
  const uint64_t size = graph.add(std::move(base))->size();

  // Open until the node has it by its own descriptor.
  const base::UniqueFd fd = nameless_file(temporary_folder());
  block::Options file;
  file.set("driver", "file");
  file.set("node-name", name + ".snapshot");
  file.set("filename", fmt::format("/proc/self/fd/{}", fd.get()));
  format_overlay(graph.add(std::move(file)), {.size = size});
  graph.add(overlay_options(name, name + ".snapshot", name + ".base"));
}

}  // namespace minivmm::control
