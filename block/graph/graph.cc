// SPDX-License-Identifier: Apache-2.0
#include "block/graph/graph.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "block/graph/opening.h"
#include "block/graph/root.h"

namespace minivmm::block {

using base::Error;

Graph::Graph(OpenPolicy policy) : policy_(std::move(policy)) {}

Graph::~Graph() {
  if (!nodes_.empty()) base::log_error("graph: destroyed with {} nodes open", nodes_.size());
}

std::shared_ptr<Node> Graph::add(Options options) {
  Opening opening(*this, options);
  return opening.run(std::move(options));
}

// Who has the name, also of those that are being opened; empty: nobody. Under mutex_.
std::string Graph::owner_of(const std::string& name) const {
  const auto is_it = [&name](const auto& each) { return each.node_name == name; };
  for (const Opening* each : openings_) {
    if (each->name_ == name || std::any_of(each->layers_.begin(), each->layers_.end(), is_it)) {
      return "a node that is being opened";
    }
    for (const auto& opened : each->opened_) {
      if (opened.node->name() == name) return opened.node->describe() + ", which is being opened";
    }
  }
  for (const Entry& entry : nodes_) {
    if (entry.node->name() == name) return entry.node->describe();
  }
  for (const auto& node : closing_) {
    if (node->name() == name) return node->describe() + ", which is being closed";
  }
  return {};
}

// Under mutex_.
void Graph::check_name_free(const std::string& name) const {
  const std::string owner = owner_of(name);
  if (owner.empty()) return;
  throw Error(EEXIST, fmt::format("node-name '{}' is taken by {}", name, owner));
}

void Graph::adopt(std::shared_ptr<Node> node) {
  const std::lock_guard editing(editing_);
  const std::lock_guard lock(mutex_);
  check_name_free(node->name());
  nodes_.push_back({std::move(node), true});
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

// What is being opened has looked at the node, and is not to find it changed. Under mutex_.
void Graph::refuse_writer(const Node& node, const std::string& user) const {
  for (const Opening* opening : openings_) {
    for (const auto& each : opening->references_) {
      if (&each.edge->node() != &node) continue;
      throw Error(EBUSY, fmt::format("{}: {} would write to it, which {} does not allow",
                                     node.describe(), user, opening->describe()));
    }
  }
}

Handle Graph::attach(const std::string& node_name, std::string user, Permissions permissions) {
  const std::lock_guard editing(editing_);
  std::shared_ptr<Node> node = find(node_name);
  if (permissions.uses != 0) {
    const std::lock_guard lock(mutex_);
    refuse_writer(*node, user);
  }
  auto root = std::make_unique<Handle::Root>(*this, std::move(node), std::move(user), permissions);
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
  lock_when_none_comes_or_goes(until);
  try {
    hold_all(until);
  } catch (...) {
    let_go();
    throw;
  }
}

void Graph::Drain::hold_all(base::Clock::time_point until) {
  {
    const std::lock_guard lock(graph_.mutex_);
    held_ = graph_.roots_;
    for (Handle::Root* root : held_) root->hold();
  }
  for (Handle::Root* root : held_) {
    if (root->wait_idle(until)) continue;
    throw Error(ETIMEDOUT,
                fmt::format("{}: {} has {} requests that do not end", root->edge.node().describe(),
                            root->edge.user(), root->in_flight()));
  }
}

Graph::Drain::~Drain() { let_go(); }

// Whose requests would meet an edit: nodes that are being closed, openings, lookers. Under mutex_.
std::string Graph::in_the_way() const {
  if (!closing_.empty()) return closing_.front()->describe() + ": closing it";
  if (const Opening* const opening = that_refers()) return opening->describe();
  return looks_.empty() ? "" : "a look at the nodes";
}

void Graph::Drain::lock_when_none_comes_or_goes(base::Clock::time_point until) {
  for (;;) {
    std::unique_lock editing(graph_.editing_);
    std::unique_lock lock(graph_.mutex_);
    if (graph_.in_the_way().empty()) {
      (void)editing.release();
      return;
    }
    editing.unlock();
    if (graph_.gone_.wait_until(lock, until, "nodes that are being opened, closed or looked at")) {
      continue;
    }
    const std::string what = graph_.in_the_way();
    if (!what.empty()) throw Error(ETIMEDOUT, what + " does not end");
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

// The nodes that somebody looks at.
class Graph::Look {
 public:
  explicit Look(Graph& graph) : graph_(graph) {
    const std::lock_guard editing(graph_.editing_);  // no drain is under way
    const std::lock_guard lock(graph_.mutex_);
    for (const Entry& entry : graph_.nodes_) nodes_.push_back(entry.node);
    for (const auto& node : nodes_) which_.push_back(node.get());
    graph_.looks_.push_back(this);
  }
  ~Look() {
    nodes_.clear();  // before whoever closes one goes on: its file is to be free then
    const std::lock_guard lock(graph_.mutex_);
    std::erase(graph_.looks_, this);
    graph_.gone_.notify_all();
  }
  Look(const Look&) = delete;
  Look& operator=(const Look&) = delete;

  const Nodes& nodes() const noexcept { return nodes_; }
  bool has(const Node* node) const noexcept {
    return std::find(which_.begin(), which_.end(), node) != which_.end();
  }

 private:
  Graph& graph_;
  Nodes nodes_;
  std::vector<const Node*> which_;
};

void Graph::look(const std::function<void(std::span<const std::shared_ptr<Node>>)>& look) {
  const Look all(*this);
  look(all.nodes());
}

// Under mutex_.
bool Graph::looked_at(const Node* node) const {
  return std::any_of(looks_.begin(), looks_.end(),
                     [node](const Look* each) { return each->has(node); });
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
  const auto add_closing = [&out](const Node& node) {
    out.push_back("node " + node.describe() + ": closing");
  };
  for (const Opening* each : openings_) {
    out.push_back(each->describe() + " is under way");
    if (!each->undone_) continue;
    for (const auto& opened : each->opened_) add_closing(*opened.node);
  }
  for (const auto& node : closing_) add_closing(*node);
  lock.unlock();
  for (const User& user : users()) {
    out.push_back(fmt::format("user {} of '{}': {} requests in flight", user.name, user.node_name,
                              user.in_flight));
  }
  return out;
}

}  // namespace minivmm::block
