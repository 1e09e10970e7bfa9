// SPDX-License-Identifier: Apache-2.0
#include "cli/image_graph.h"

#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/error.h"
#include "base/log.h"
#include "base/nbd_uri.h"

namespace minivmm::cli {

using block::Edge;
using block::Permissions;

ImageGraph::ImageGraph(block::OpenPolicy policy, unsigned loops, base::BackendChoice backend)
    : loops_(loops, backend), graph_(std::make_unique<block::Graph>(std::move(policy))) {}

ImageGraph::~ImageGraph() = default;

ImageGraph::OpenFile::OpenFile(block::Graph& graph, block::Options options,
                               const FileAccess& access)
    : graph_(graph) {
  const auto set_unless_given = [&](const char* key, const char* value) {
    if (!options.has(key)) options.set(key, value);
  };
  set_unless_given("read-only", access.writable ? "off" : "on");
  if (const std::string driver = options.peek("driver").value_or("");
      driver == "file" || driver == "host_device") {
    if (!access.locked) set_unless_given("locking", "off");
    if (access.direct && !options.has("cache")) options.set("cache.direct", "on");
    if (access.no_flush && !options.has("cache")) options.set("cache.no-flush", "on");
    if (!access.inode.empty()) options.set("inode", access.inode);
  }
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

// "nbd:HOST:PORT", "nbd:unix:PATH", each with ":exportname=NAME" behind it or not.
std::string uri_of_old_form(const std::string& name) {
  constexpr std::string_view kExport = ":exportname=";
  std::string_view rest = std::string_view(name).substr(4);
  base::NbdUri uri;
  if (const size_t at = rest.find(kExport); at != rest.npos) {
    uri.export_name = rest.substr(at + kExport.size());
    rest = rest.substr(0, at);
  }
  constexpr std::string_view kUnix = "unix:";
  if (rest.starts_with(kUnix)) {
    uri.socket_path = rest.substr(kUnix.size());
    return uri.text();
  }
  const base::NbdUri address = base::parse_nbd_uri("nbd://" + std::string(rest));
  uri.host = address.host;
  uri.port = address.port;
  return uri.text();
}

}  // namespace

block::Options file_options(const std::string& path) {
  block::Options out;
  set_protocol(out, "", path);
  return out;
}

bool set_protocol(block::Options& options, const std::string& prefix, const std::string& path) {
  const bool is_file = !base::is_nbd_uri(path);
  options.set(prefix + "driver", is_file ? "file" : "nbd");
  options.set(prefix + (is_file ? "filename" : "uri"), path);
  return is_file;
}

std::string host_path(const std::string& file_name) {
  if (base::is_nbd_uri(file_name)) return base::parse_nbd_uri(file_name).text();
  if (file_name.starts_with("nbd:")) return uri_of_old_form(file_name);
  if (file_name.empty()) throw base::Error(EINVAL, "an image file's name is empty");
  const size_t protocol = protocol_length(file_name);
  if (protocol == std::string::npos) return file_name;
  if (file_name.substr(0, protocol) == "file") return host_path(file_name.substr(protocol + 1));
  throw base::Error(EINVAL, fmt::format("{0}: Unknown protocol '{1}' (only files of this host and "
                                        "NBD URIs are supported; ./{0} is the file of that name)",
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
