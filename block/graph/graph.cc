// SPDX-License-Identifier: Apache-2.0
#include "block/graph/graph.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/fresh_stack.h"
#include "base/log.h"
#include "block/graph/driver.h"
#include "block/graph/root.h"

namespace minivmm::block {

using base::Error;

Graph::Graph(OpenPolicy policy) : policy_(std::move(policy)) {}

Graph::~Graph() {
  if (!nodes_.empty()) base::log_error("graph: destroyed with {} nodes open", nodes_.size());
}

// For a child its parent's name and its own key, so that messages about it tell whose it is.
std::string Graph::make_name(const char* key) {
  constexpr size_t kMaxMadeUp = 64;
  if (key != nullptr && !opening_.empty()) {
    std::string name = opening_.back().node_name + "." + key;
    if (name.size() <= kMaxMadeUp && owner_of(name).empty()) return name;
  }
  for (;;) {
    std::string name = fmt::format("#block{}", next_number_++);
    if (owner_of(name).empty()) return name;
  }
}

namespace {

void prepare(Options& options) {
  options.for_each_level([](Options& level) {
    const std::string name = level.peek("driver").value_or("");
    for (const Driver& driver : drivers()) {
      if (driver.prepare != nullptr && driver.name == name) driver.prepare(level);
    }
  });
}

}  // namespace

std::shared_ptr<Node> Graph::add(Options options) {
  prepare(options);
  std::unique_lock editing(editing_);
  size_t before = 0;
  {
    const std::lock_guard lock(mutex_);
    before = nodes_.size();
  }
  try {
    return open(std::move(options), nullptr);
  } catch (...) {
    opening_.clear();
    Nodes opened;
    {
      const std::lock_guard lock(mutex_);
      for (size_t i = nodes_.size(); i > before; --i) opened.push_back(nodes_[i - 1].node);
    }
    take_out(opened);
    editing.unlock();
    // What is thrown says more than what comes of closing, which is logged.
    std::exception_ptr error = std::current_exception();
    close_taken(std::move(opened), error);
    throw;
  }
}

// Who has the name, also of those that are being opened; empty: nobody. Under editing_.
std::string Graph::owner_of(const std::string& name) const {
  for (const Opening& parent : opening_) {
    if (parent.node_name == name) return "the node that it is opened for";
  }
  const std::lock_guard lock(mutex_);
  for (const Entry& entry : nodes_) {
    if (entry.node->name() == name) return entry.node->describe();
  }
  for (const auto& node : closing_) {
    if (node->name() == name) return node->describe() + ", which is being closed";
  }
  return {};
}

void Graph::check_name_free(const std::string& name) const {
  const std::string owner = owner_of(name);
  if (owner.empty()) return;
  throw Error(EEXIST, fmt::format("node-name '{}' is taken by {}", name, owner));
}

void Graph::adopt(std::shared_ptr<Node> node) {
  const std::lock_guard editing(editing_);
  check_name_free(node->name());
  const std::lock_guard lock(mutex_);
  nodes_.push_back({std::move(node), true});
}

void Graph::check_depth() const {
  if (opening_.size() <= kMaxGraphDepth) return;
  std::vector<std::string> first;
  for (size_t i = 0; i < 8; ++i) first.push_back(opening_[i].label);
  throw Error(ELOOP, fmt::format("more than {} layers (a loop of backing files?): {} -> ...",
                                 kMaxGraphDepth, fmt::join(first, " -> ")));
}

// Under editing_. `key`: whose child it is of the node that is being opened; null: it is kept by
// its own name.
std::shared_ptr<Node> Graph::open(Options options, const char* key) {
  const std::string driver_name = options.take_string("driver").value_or("");
  if (driver_name.empty()) {
    throw Error(EINVAL, "a node needs a 'driver' option (qcow2, raw, file, ...)");
  }
  const Driver& driver = find_driver(driver_name);
  NodeConfig config;
  config.node_name = options.take_string("node-name").value_or("");
  if (config.node_name.empty()) config.node_name = make_name(key);
  config.read_only = options.take_bool("read-only", false);
  const bool write_through = !options.take_bool("cache.writeback", true);
  check_name_free(config.node_name);
  opening_.push_back({config.node_name, options.peek("filename").value_or(config.node_name)});
  check_depth();
  std::shared_ptr<Node> node = driver.open(*this, config, options);
  opening_.pop_back();
  node->set_write_through(write_through);
  node->set_corruption_listener(on_corruption_);
  {
    const std::lock_guard lock(mutex_);
    nodes_.push_back({node, key == nullptr});
  }
  options.finish(node->describe());  // after registering: a failure is cleaned up like any other
  return node;
}

std::shared_ptr<Node> Graph::open_inline(Options options, const char* key) {
  // Each level on a stack of its own: opening has larger frames than reading.
  std::shared_ptr<Node> node;
  base::run_on_fresh_stack([&] { node = open(std::move(options), key); });
  return node;
}

std::shared_ptr<Node> Graph::open_child(Options& parent, const char* key, bool inherit_read_only) {
  auto child = parent.take_child(key);
  if (!child)
    throw Error(EINVAL, fmt::format("option '{}' is missing: a node or its options", key));
  if (!child->options) return find(child->reference);
  if (inherit_read_only && !child->options->has("read-only")) {
    child->options->set("read-only", "on");
  }
  return open_inline(std::move(*child->options), key);
}

std::shared_ptr<Node> Graph::find(const std::string& node_name) const {
  const std::lock_guard lock(mutex_);
  std::vector<std::string> names;
  for (const Entry& entry : nodes_) {
    if (entry.node->name() == node_name) return entry.node;
    if (entry.named) names.push_back(entry.node->name());
  }
  throw Error(ENOENT, names.empty() ? fmt::format("no node '{}': there are no nodes yet", node_name)
                                    : fmt::format("no node '{}'; there are: {}", node_name,
                                                  fmt::join(names, ", ")));
}

Handle Graph::attach(const std::string& node_name, std::string user, Permissions permissions) {
  const std::lock_guard editing(editing_);
  auto root = std::make_unique<Handle::Root>(*this, find(node_name), std::move(user), permissions);
  const std::lock_guard lock(mutex_);
  roots_.push_back(root.get());
  return Handle(std::move(root));
}

void Graph::unregister_root(std::unique_ptr<Handle::Root> root) {
  // Not while a drain looks at it.
  const std::lock_guard editing(editing_);
  {
    const std::lock_guard lock(mutex_);
    std::erase(roots_, root.get());
  }
  root.reset();
  const std::lock_guard lock(mutex_);
  gone_.notify_all();
}

void Graph::reap(std::unique_ptr<Handle::Root> root) noexcept {
  const auto finish = [this](Handle::Root* raw) {
    std::unique_ptr<Handle::Root> owned(raw);
    try {
      owned->finish();
    } catch (const std::exception& e) {
      base::log_error("{}: {}: closing: {}", owned->edge.node().describe(), owned->edge.user(),
                      e.what());
    }
    unregister_root(std::move(owned));
  };
  base::EventLoop* loop = base::EventLoop::current();
  if (loop == nullptr) {
    // No loop to wait on: nothing can be in flight from here, but nothing can be flushed either.
    if (root->written.load(std::memory_order_relaxed)) {
      base::log_error("{}: {}: was not closed; unflushed writes wait for the node's own close",
                      root->edge.node().describe(), root->edge.user());
    }
    const std::lock_guard lock(mutex_);
    std::erase(roots_, root.get());
    return;
  }
  reaping_.add();
  loop->post("reap handle", [this, finish, raw = root.release()] {
    finish(raw);
    reaping_.done();
  });
}

Graph::Drain::Drain(Graph& graph, std::chrono::milliseconds deadline) : graph_(graph) {
  const auto until = base::Clock::now() + deadline;
  lock_when_none_closes(until);
  {
    const std::lock_guard lock(graph_.mutex_);
    held_ = graph_.roots_;
    for (Handle::Root* root : held_) root->hold();
  }
  for (Handle::Root* root : held_) {
    if (root->wait_idle(until)) continue;
    const std::string text =
        fmt::format("{}: {} has {} requests that do not end", root->edge.node().describe(),
                    root->edge.user(), root->in_flight());
    let_go();
    throw Error(ETIMEDOUT, text);
  }
}

Graph::Drain::~Drain() { let_go(); }

// A node's last writes would meet the edit.
void Graph::Drain::lock_when_none_closes(base::Clock::time_point until) {
  for (;;) {
    std::unique_lock editing(graph_.editing_);
    std::unique_lock lock(graph_.mutex_);
    if (graph_.closing_.empty()) {
      (void)editing.release();
      return;
    }
    editing.unlock();
    if (!graph_.gone_.wait_until(lock, until, "nodes that are being closed") &&
        !graph_.closing_.empty()) {
      throw Error(ETIMEDOUT, graph_.closing_.front()->describe() + ": closing it does not end");
    }
  }
}

void Graph::Drain::let_go() noexcept {
  for (Handle::Root* root : held_) root->let_go();
  graph_.editing_.unlock();
}

void Graph::replace_node(Handle& handle, const std::string& node_name) {
  std::shared_ptr<Node> node = find(node_name);
  const std::lock_guard lock(mutex_);  // describe() looks at what the handle points to
  handle.root_->edge.replace(std::move(node));
}

void Graph::look(const std::function<void(std::span<const std::shared_ptr<Node>>)>& look) {
  const std::lock_guard editing(editing_);
  std::vector<std::shared_ptr<Node>> nodes;
  {
    const std::lock_guard lock(mutex_);
    nodes.reserve(nodes_.size());
    for (const Entry& entry : nodes_) nodes.push_back(entry.node);
  }
  look(nodes);
}

std::vector<Graph::User> Graph::users() const {
  const std::lock_guard lock(mutex_);
  std::vector<User> out;
  out.reserve(roots_.size());
  for (const Handle::Root* root : roots_) {
    out.push_back({root->edge.user(), root->edge.node().name(), root->in_flight()});
  }
  return out;
}

std::vector<std::string> Graph::describe() const {
  std::unique_lock lock(mutex_);
  std::vector<std::string> out;
  for (const Entry& entry : nodes_) {
    const Node& node = *entry.node;
    const auto users = node.users();
    out.push_back(
        fmt::format("node {}: {} bytes{}, errors {}, used by {}", node.describe(), node.size(),
                    node.read_only() ? ", read-only" : "",
                    entry.node->counters().errors.load(std::memory_order_relaxed),
                    users.empty() ? "nobody" : fmt::format("{}", fmt::join(users, "; "))));
    if (const std::string state = node.state(); !state.empty()) {
      out.push_back(fmt::format("node '{}': {}", node.name(), state));
    }
  }
  for (const auto& node : closing_) out.push_back("node " + node->describe() + ": closing");
  lock.unlock();
  for (const User& user : users()) {
    out.push_back(fmt::format("user {} of '{}': {} requests in flight", user.name, user.node_name,
                              user.in_flight));
  }
  return out;
}

}  // namespace minivmm::block
