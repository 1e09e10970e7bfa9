// SPDX-License-Identifier: Apache-2.0
#include "control/overlay.h"

#include <fcntl.h>
#include <stdlib.h>

#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/edge.h"

namespace minivmm::control {

std::string temporary_folder() {
  const char* const set = ::getenv("TMPDIR");
  return set != nullptr && *set != '\0' ? set : "/var/tmp";
}

base::UniqueFd nameless_file(const std::string& folder) {
  base::UniqueFd fd(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!fd) {
    throw base::errno_error(
        errno, fmt::format("{}: no file for a snapshot can be made there; set TMPDIR to a folder "
                           "where one can",
                           folder));
  }
  return fd;
}

void format_overlay(std::shared_ptr<block::Node> file, const block::qcow2::CreateOptions& options) {
  block::Edge edge(std::move(file), "the making of an overlay",
                   block::Permissions::format_file(true));
  block::qcow2::create_image(edge, options);
}

block::Options overlay_options(const std::string& node_name, const std::string& file,
                               const std::string& backing) {
  block::Options overlay;
  overlay.set("driver", "qcow2");
  overlay.set("node-name", node_name);
  overlay.set("file", file);
  overlay.set("backing", backing);
  return overlay;
}

}  // namespace minivmm::control
