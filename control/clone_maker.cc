// SPDX-License-Identifier: Apache-2.0
#include "control/clone_maker.h"

#include <fcntl.h>
#include <string_view>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <filesystem>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "base/log.h"
#include "base/pool.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/protocols/memory.h"
#include "control/overlay.h"

namespace minivmm::control {

using base::Error;
using block::Options;

namespace {

// Small clusters: a client's 4 KiB cost 16 KiB and not 64. Not for disks so large that the tables
// of each clone would be.
constexpr unsigned kMemoryClusterBits = 14;
constexpr uint64_t kMostForSmallClusters = uint64_t{4} << 40;
constexpr uint64_t kMostMemory = uint64_t{1} << 40;
// The tables are in memory already.
constexpr const char* kMemoryTableCache = "1M";

std::string space_of(const std::string& name) { return name + ".space"; }
std::string file_of(const std::string& name) { return name + ".file"; }

Options file_options(const std::string& node_name, const base::UniqueFd& fd) {
  Options file;
  file.set("driver", "file");
  file.set("node-name", node_name);
  // Opened anew by the node.
  file.set("filename", fmt::format("/proc/self/fd/{}", fd.get()));
  return file;
}

// By a thread that may: those of the loops open nothing once clients come.
base::UniqueFd make_nameless_file(const std::string& folder) {
  return base::Pool::errands().run([&] { return nameless_file(folder); });
}

// Gives an image that is complete its name, so that the name is there after a power loss, too.
void link_file(int fd, const std::string& path) {
  base::Pool::errands().run([&] {
    const std::string from = fmt::format("/proc/self/fd/{}", fd);
    if (::linkat(AT_FDCWD, from.c_str(), AT_FDCWD, path.c_str(), AT_SYMLINK_FOLLOW) != 0) {
      throw base::errno_error(errno, fmt::format("{}: cannot be made", path));
    }
    const std::string folder = path.substr(0, path.rfind('/') + 1);
    const base::UniqueFd directory(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!directory || ::fsync(directory.get()) != 0) {
      throw base::errno_error(errno, fmt::format("{}: cannot be made durable", path));
    }
  });
}

// What a clone that is kept records as its backing file; empty where that is no file of this host,
// or not all of it.
std::string recorded_name(block::Node& base) {
  const bool whole =
      base.driver() == std::string_view("qcow2") ||
      (base.driver() == std::string_view("raw") && base.children().at(0)->size() == base.size());
  std::error_code ignored;
  const std::string file = base.filename();
  if (!whole || file.empty() || !std::filesystem::exists(file, ignored)) return {};
  return std::filesystem::absolute(file).string();
}

}  // namespace

// The nodes of a clone, undone if it does not come to be.
class CloneMaker::Nodes {
 public:
  explicit Nodes(block::Graph& graph) : graph_(graph) {}
  ~Nodes() {
    for (auto name = names_.rbegin(); name != names_.rend(); ++name) {
      try {
        graph_.remove(*name);
      } catch (const std::exception& e) {
        base::log_warning("{}: {}", *name, e.what());
      }
    }
  }
  Nodes(const Nodes&) = delete;
  Nodes& operator=(const Nodes&) = delete;

  std::shared_ptr<block::Node> adopt(std::shared_ptr<block::Node> node) {
    graph_.adopt(node);
    names_.push_back(node->name());
    return node;
  }
  std::shared_ptr<block::Node> add(Options options) {
    auto node = graph_.add(std::move(options));
    names_.push_back(node->name());
    return node;
  }
  void keep() noexcept { names_.clear(); }

 private:
  block::Graph& graph_;
  std::vector<std::string> names_;
};

CloneMaker::CloneMaker(block::Graph& graph, const Export& wanted)
    : graph_(graph),
      export_name_(wanted.name),
      options_(*wanted.clone),
      base_(graph.find(wanted.node_name)),
      recorded_base_(recorded_name(*base_)),
      space_(std::make_shared<block::SpaceBudget>(options_.total)) {}

std::string CloneMaker::kept_path(const std::string& client) const {
  if (options_.directory.empty() || client.empty()) return {};
  return fmt::format("{}/{}@{}.qcow2", options_.directory, export_name_, client);
}

block::qcow2::CreateOptions CloneMaker::create_options() const {
  block::qcow2::CreateOptions out;
  out.size = base_->size();
  if (options_.in_memory && out.size <= kMostForSmallClusters) {
    out.cluster_bits = kMemoryClusterBits;
  }
  return out;
}

// Makes the image of a client that has none yet.
void CloneMaker::make_kept_file(const std::string& name, const std::string& path) {
  const bool there = base::Pool::errands().run([&] { return ::access(path.c_str(), F_OK) == 0; });
  if (there) return;
  block::qcow2::CreateOptions options = create_options();
  options.backing_file = recorded_base_;
  if (!options.backing_file.empty()) options.backing_format = base_->driver();
  const base::UniqueFd fd = make_nameless_file(options_.directory);
  {
    Nodes nodes(graph_);
    format_overlay(nodes.add(file_options(file_of(name), fd)), options);
  }
  link_file(fd.get(), path);
}

// An overlay on another base would read as a mixture of both.
void CloneMaker::require_same_base(const block::Node& overlay, const std::string& path) const {
  const auto* const image = dynamic_cast<const block::Qcow2Node*>(&overlay);
  const std::string recorded = image != nullptr ? image->header().backing_file : std::string();
  const uint64_t size = base::align_up(base_->size(), uint64_t{512});
  if (overlay.size() == size && recorded == recorded_base_) return;
  throw Error(EINVAL, fmt::format("{}: was made for another base ('{}', {} bytes): remove it, or "
                                  "serve what it was made for",
                                  path, recorded, overlay.size()));
}

std::shared_ptr<block::Node> CloneMaker::add_file(Nodes& nodes, const std::string& name,
                                                  const std::string& kept) {
  if (!kept.empty()) {
    make_kept_file(name, kept);
    Options file;
    file.set("driver", "file");
    file.set("node-name", file_of(name));
    file.set("filename", kept);
    return nodes.add(std::move(file));
  }
  if (options_.in_memory) {
    const uint64_t room = std::min({options_.limit, options_.total, kMostMemory});
    return nodes.adopt(
        std::make_shared<block::MemoryNode>(block::NodeConfig{file_of(name), false}, 0, room));
  }
  const base::UniqueFd fd = make_nameless_file(temporary_folder());
  Options file = file_options(file_of(name), fd);
  // It does not outlive this process, so there is nothing to make durable.
  file.set("cache.no-flush", "on");
  return nodes.add(std::move(file));
}

block::Handle CloneMaker::open(const std::string& client) {
  const std::string name =
      fmt::format("{}.clone{}", base_->name(), next_.fetch_add(1, std::memory_order_relaxed));
  const std::string kept = kept_path(client);
  Nodes nodes(graph_);
  const auto space = nodes.adopt(
      std::make_shared<block::QuotaNode>(block::NodeConfig{space_of(name), false},
                                         add_file(nodes, name, kept), options_.limit, space_));
  if (kept.empty()) format_overlay(space, create_options());
  Options overlay = overlay_options(name, space->name(), base_->name());
  if (options_.in_memory) overlay.set("l2-cache-size", kMemoryTableCache);
  const auto disk = nodes.add(std::move(overlay));
  if (!kept.empty()) require_same_base(*disk, kept);
  block::Handle out = graph_.attach(
      name, fmt::format("NBD clone '{}{}{}'", export_name_, client.empty() ? "" : "/", client),
      block::Permissions::front_end(true));
  nodes.keep();
  return out;
}

void CloneMaker::close(block::Handle disk, const std::string& client) {
  const std::string name = disk.node_name();
  std::exception_ptr error;
  const auto attempt = [&error](auto work) {
    try {
      work();
    } catch (const std::exception& e) {
      base::log_debug("the end of a clone: {}", e.what());
      if (!error) error = std::current_exception();
    }
  };
  attempt([&] { disk.close(); });
  for (const std::string& each : {name, space_of(name), file_of(name)}) {
    attempt([&] { graph_.remove(each); });
  }
  // What is thrown away need not have been written.
  if (error && !kept_path(client).empty()) std::rethrow_exception(error);
}

}  // namespace minivmm::control
