// SPDX-License-Identifier: Apache-2.0
#include "control/snapshot.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string>

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "base/unique_fd.h"
#include "block/formats/qcow2/create.h"
#include "block/graph/edge.h"

namespace minivmm::control {
namespace {

base::UniqueFd nameless_file() {
  const char* const set = ::getenv("TMPDIR");
  const std::string folder = set != nullptr && *set != '\0' ? set : "/var/tmp";
  base::UniqueFd fd(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!fd) {
    throw base::errno_error(
        errno, fmt::format("{}: no file for a snapshot can be made there; set TMPDIR to a folder "
                           "where one can",
                           folder));
  }
  return fd;
}

}  // namespace

void add_snapshot(block::Graph& graph, const Disk& disk) {
  const std::string& name = disk.node_name;
  block::Options base = disk.node;
  (void)base.take_string("node-name");
  base.set("node-name", name + ".base");
  const uint64_t size = graph.add(std::move(base))->size();

  // Open until the node has it by its own descriptor.
  const base::UniqueFd fd = nameless_file();
  block::Options file;
  file.set("driver", "file");
  file.set("node-name", name + ".snapshot");
  file.set("filename", fmt::format("/proc/self/fd/{}", fd.get()));
  {
    block::Edge edge(graph.add(std::move(file)), "the making of a snapshot",
                     block::Permissions::format_file(true));
    block::qcow2::CreateOptions create;
    create.size = size;
    block::qcow2::create_image(edge, create);
  }
  block::Options overlay;
  overlay.set("driver", "qcow2");
  overlay.set("node-name", name);
  overlay.set("file", name + ".snapshot");
  overlay.set("backing", name + ".base");
  graph.add(std::move(overlay));
}

}  // namespace minivmm::control
