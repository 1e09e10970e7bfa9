// SPDX-License-Identifier: Apache-2.0
#include "block/graph/graph.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>
#include <fmt/ranges.h>

#include "base/error.h"
#include "base/event_loop.h"
#include "base/log.h"
#include "block/graph/edge.h"
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
  for (const Closing& each : closing_) {
    if (each.node->name() == name) return each.node->describe() + ", which is being closed";
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
  const std::vector<Edge*> children = node->children();
  Editing editing(editing_);
  std::unique_lock lock(mutex_);
  const auto would_reach_one = [&] {
    return is_drained(*node) ||
           std::any_of(children.begin(), children.end(),
                       [&](const Edge* edge) { return is_drained(edge->node()); });
  };
  while (would_reach_one()) {
    wait_for_drain(editing, lock);
    lock.lock();
  }
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
  Editing editing(editing_);
  std::shared_ptr<Node> node = find_undrained(editing, node_name);
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
  Editing editing(editing_);
  {
    // Not while a drain looks at it.
    std::unique_lock lock(mutex_);
    while (is_drained(root->edge.node())) {
      wait_for_drain(editing, lock);
      lock.lock();
    }
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

void Graph::replace_node(Handle& handle, const std::string& node_name) {
  std::shared_ptr<Node> node = find(node_name);
  const std::lock_guard lock(mutex_);  // describe() looks at what the handle points to
  handle.root_->edge.replace(std::move(node));
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
  for (const Closing& each : closing_) add_closing(*each.node);
  lock.unlock();
  for (const User& user : users()) {
    out.push_back(fmt::format("user {} of '{}': {} requests in flight", user.name, user.node_name,
                              user.in_flight));
  }
  return out;
}

}  // namespace minivmm::block
