// SPDX-License-Identifier: Apache-2.0
#include "block/graph/opening.h"

#include <algorithm>
#include <cerrno>
#include <exception>
#include <mutex>
#include <utility>

#include <fmt/core.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/fresh_stack.h"
#include "base/log.h"
#include "block/graph/driver.h"
#include "block/graph/graph.h"

namespace minivmm::block {

using base::Error;

Opening::Opening(Graph& graph, const Options& options)
    : graph_(graph), name_(options.peek("node-name").value_or("")) {
  const std::lock_guard lock(graph_.mutex_);
  if (graph_.ending_) throw Error(ESHUTDOWN, "no node is opened any more: all are being closed");
  if (!name_.empty()) graph_.check_name_free(name_);
  graph_.openings_.push_back(this);
}

Opening::~Opening() {
  const std::lock_guard lock(graph_.mutex_);
  std::erase(graph_.openings_, this);
  graph_.gone_.notify_all();
}

const OpenPolicy& Opening::policy() const noexcept { return graph_.policy(); }

std::string Opening::describe() const {
  return name_.empty() ? "the opening of a node" : fmt::format("the opening of '{}'", name_);
}

std::shared_ptr<Node> Opening::run(Options options) {
  try {
    std::shared_ptr<Node> node = open(std::move(options), nullptr);
    publish();
    return node;
  } catch (...) {
    undo();
    const std::lock_guard lock(graph_.mutex_);
    if (given_up_.empty()) throw;
    throw Error(ECANCELED, fmt::format("{} was given up: {}", describe(), given_up_));
  }
}

// `key`: whose child it is of the node that is being opened; null: it is kept by its own name.
std::shared_ptr<Node> Opening::open(Options options, const char* key) {
  const std::string driver_name = options.take_string("driver").value_or("");
  if (driver_name.empty()) {
    throw Error(EINVAL, "a node needs a 'driver' option (qcow2, raw, file, ...)");
  }
  const Driver& driver = find_driver(driver_name);
  NodeConfig config;
  config.node_name = options.take_string("node-name").value_or("");
  config.read_only = options.take_bool("read-only", false);
  const bool write_through = !options.take_bool("cache.writeback", true);
  begin_layer(config, key, options);
  check_depth();
  std::shared_ptr<Node> node = driver.open(*this, config, options);
  node->set_write_through(write_through);
  node->set_corruption_listener(graph_.on_corruption_);
  end_layer(node, key == nullptr);
  options.finish(node->describe());  // after end_layer: a failure is cleaned up like any other
  return node;
}

// Takes its name.
void Opening::begin_layer(NodeConfig& config, const char* key, const Options& options) {
  const std::lock_guard lock(graph_.mutex_);
  check_wanted();
  if (config.node_name.empty()) config.node_name = make_name(key);
  const bool reserved = layers_.empty() && config.node_name == name_;
  if (!reserved) graph_.check_name_free(config.node_name);
  layers_.push_back({config.node_name, options.peek("filename").value_or(config.node_name)});
}

void Opening::end_layer(const std::shared_ptr<Node>& node, bool named) {
  const std::lock_guard lock(graph_.mutex_);
  opened_.push_back({node, named});
  layers_.pop_back();
}

// For a child its parent's name and its own key, so that messages about it tell whose it is. Under
// the graph's mutex.
std::string Opening::make_name(const char* key) const {
  constexpr size_t kMaxMadeUp = 64;
  if (key != nullptr && !layers_.empty()) {
    std::string name = layers_.back().node_name + "." + key;
    if (name.size() <= kMaxMadeUp && graph_.owner_of(name).empty()) return name;
  }
  for (;;) {
    std::string name = fmt::format("#block{}", graph_.next_number_++);
    if (graph_.owner_of(name).empty()) return name;
  }
}

void Opening::check_depth() const {
  const std::lock_guard lock(graph_.mutex_);
  if (layers_.size() <= kMaxGraphDepth) return;
  std::vector<std::string> first;
  for (size_t i = 0; i < 8; ++i) first.push_back(layers_[i].label);
  throw Error(ELOOP, fmt::format("more than {} layers (a loop of backing files?): {} -> ...",
                                 kMaxGraphDepth, fmt::join(first, " -> ")));
}

std::shared_ptr<Node> Opening::open_inline(Options options, const char* key) {
  // Each level on a stack of its own: opening has larger frames than reading.
  std::shared_ptr<Node> node;
  base::run_on_fresh_stack([&] { node = open(std::move(options), key); });
  return node;
}

std::shared_ptr<Node> Opening::open_child(Options& parent, const char* key,
                                          bool inherit_read_only) {
  auto child = parent.take_child(key);
  if (!child)
    throw Error(EINVAL, fmt::format("option '{}' is missing: a node or its options", key));
  if (!child->options) return refer_to(child->reference, !inherit_read_only);
  if (inherit_read_only && !child->options->has("read-only")) {
    child->options->set("read-only", "on");
  }
  return open_inline(std::move(*child->options), key);
}

// What is opened looks at the node before it uses it, and nobody may change it between: whoever
// stands above another node shares it with no writer, so who writes to it is in the way already,
// and who wants to begin is refused (Graph::refuse_writer).
std::shared_ptr<Node> Opening::refer_to(const std::string& node_name, bool writes) {
  Graph::Editing editing(graph_.editing_);  // no drain begins, nothing is taken out
  std::shared_ptr<Node> node = graph_.find_undrained(editing, node_name);
  const std::lock_guard lock(graph_.mutex_);
  check_wanted();
  for (const Opening* other : graph_.openings_) {
    for (const Reference& each : other->references_) {
      if (other == this || &each.edge->node() != node.get() || !(each.writes || writes)) continue;
      throw Error(EBUSY, fmt::format("{}: {} uses it, and one of them would write to it",
                                     node->describe(), other->describe()));
    }
  }
  (void)Edge(node, describe(), Permissions::backing());
  references_.push_back(
      {std::make_unique<Edge>(node, describe(), Permissions::observer()), writes});
  return node;
}

void Opening::when_given_up(GiveUp give_up) {
  const std::lock_guard lock(graph_.mutex_);
  check_wanted();
  give_ups_.push_back(std::move(give_up));
}

// Under the graph's mutex.
void Opening::check_wanted() const {
  if (!given_up_.empty()) throw Error(ECANCELED, given_up_);
}

// Returns whom to call, without the graph's mutex, which is held here.
std::vector<Opening::GiveUp> Opening::give_up(const std::string& why) {
  if (given_up_.empty()) given_up_ = why;
  return std::exchange(give_ups_, {});
}

// All of it at once.
void Opening::publish() {
  std::vector<Reference> references;
  Graph::Editing editing(graph_.editing_);
  std::unique_lock lock(graph_.mutex_);
  // Not one of a node below: what is referred to is in a drain's way. One of all.
  while (std::any_of(opened_.begin(), opened_.end(),
                     [&](const Opened& each) { return graph_.is_drained(*each.node); })) {
    graph_.wait_for_drain(editing, lock);
    lock.lock();
  }
  check_wanted();
  graph_.nodes_.reserve(graph_.nodes_.size() + opened_.size());
  for (Opened& each : opened_) graph_.nodes_.push_back({std::move(each.node), each.named});
  opened_.clear();
  references.swap(references_);
}

// Parents before their children; they are in opened_, and their names taken, until they are closed.
// What was thrown says more than what comes of closing.
void Opening::undo() noexcept {
  {
    const std::lock_guard lock(graph_.mutex_);
    layers_.clear();
    undone_ = true;
  }
  // Only this fiber changes what it has opened.
  for (const Opened& each : opened_) each.node->closing();
  while (!opened_.empty()) {
    std::shared_ptr<Node> node = opened_.back().node;
    try {
      node->close();
    } catch (const std::exception& e) {
      base::log_error("{}: closing: {}", node->describe(), e.what());
    }
    {
      const std::lock_guard lock(graph_.mutex_);
      opened_.pop_back();
    }
    node.reset();  // its edges let go of its children, and its file is free
  }
  std::vector<Reference> references;
  const std::lock_guard lock(graph_.mutex_);
  references.swap(references_);
}

}  // namespace minivmm::block
