// SPDX-License-Identifier: Apache-2.0
#include "cli/image_graph.h"

#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::cli {

using block::Edge;
using block::Permissions;

ImageGraph::ImageGraph(block::OpenPolicy policy, unsigned loops, base::BackendChoice backend)
    : loops_(loops, backend), graph_(std::make_unique<block::Graph>(std::move(policy))) {}

ImageGraph::~ImageGraph() = default;

ImageGraph::OpenFile::OpenFile(block::Graph& graph, const std::string& path, FileAccess access)
    : graph_(graph) {
  block::Options options;
  options.set("driver", "file");
  options.set("filename", path);
  options.set("read-only", access.writable ? "off" : "on");
  options.set("locking", access.locked ? "auto" : "off");
  options.set("cache.direct", access.direct ? "on" : "off");
  std::shared_ptr<block::Node> node = graph.add(std::move(options));
  node_name_ = node->name();
  const uint8_t uses = access.writable ? Permissions::kWrite | Permissions::kResize : 0;
  edge_ = std::make_unique<Edge>(std::move(node), "the image command",
                                 Permissions{.uses = uses, .shares = 0});
}

ImageGraph::OpenFile::~OpenFile() {
  try {
    close();
  } catch (const std::exception& e) {
    // Only while another error is on its way, which says more.
    base::log_error("{}", e.what());
  }
}

void ImageGraph::OpenFile::close() {
  edge_.reset();
  if (const std::string name = std::exchange(node_name_, {}); !name.empty()) graph_.remove(name);
}

namespace {

// QEMU's rule: a name with a colon before any slash begins with a protocol.
size_t protocol_length(const std::string& name) {
  const size_t colon = name.find(':');
  return colon != std::string::npos && colon < name.find('/') ? colon : std::string::npos;
}

}  // namespace

std::string host_path(const std::string& file_name) {
  if (file_name.empty()) throw base::Error(EINVAL, "an image file's name is empty");
  const size_t protocol = protocol_length(file_name);
  if (protocol == std::string::npos) return file_name;
  if (file_name.substr(0, protocol) == "file") return host_path(file_name.substr(protocol + 1));
  throw base::Error(EINVAL, fmt::format("{0}: Unknown protocol '{1}' (only files of this host are "
                                        "supported; ./{0} is the file of that name)",
                                        file_name, file_name.substr(0, protocol)));
}

std::string path_from_image(const std::string& image, const std::string& reference) {
  if (reference.starts_with('/') || protocol_length(reference) != std::string::npos) {
    return reference;
  }
  const size_t slash = image.rfind('/');
  return slash == std::string::npos ? reference : image.substr(0, slash + 1) + reference;
}

}  // namespace minivmm::cli
