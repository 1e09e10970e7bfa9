// SPDX-License-Identifier: Apache-2.0
// How the graph is held still, all of it or what reaches a node; and how it is looked at meanwhile.
#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/graph/graph.h"
#include "block/graph/look.h"
#include "block/graph/opening.h"
#include "block/graph/reaching.h"
#include "block/graph/root.h"

namespace minivmm::block {

using base::Error;

Graph::Drain::Drain(Graph& graph, const Node& node, std::chrono::milliseconds deadline)
    : Drain(graph, &node, deadline) {}
Graph::Drain::Drain(Graph& graph, std::chrono::milliseconds deadline)
    : Drain(graph, nullptr, deadline) {}

Graph::Drain::Drain(Graph& graph, const Node* node, std::chrono::milliseconds deadline)
    : graph_(graph) {
  const auto until = base::Clock::now() + deadline;
  begin(node, until);
  try {
    wait_for_requests(until);
  } catch (...) {
    let_go();
    throw;
  }
}

void Graph::Drain::wait_for_requests(base::Clock::time_point until) {
  for (Handle::Root* root : held_) {
    if (root->wait_idle(until)) continue;
    throw Error(ETIMEDOUT,
                fmt::format("{}: {} has {} requests that do not end", root->edge.node().describe(),
                            root->edge.user(), root->in_flight()));
  }
}

Graph::Drain::~Drain() { let_go(); }

// Whose requests would meet a change: nodes that are being closed, openings, lookers; and who makes
// another. Under mutex_.
std::string Graph::in_the_way(const Reaching& reaching) const {
  for (const Reaching* other : drained_) {
    if (other->meets(reaching)) return "a change of what is inside a node";
  }
  for (const Closing& each : closing_) {
    if (reaching.has(*each.node)) return each.node->describe() + ": closing it";
  }
  for (const Opening* opening : openings_) {
    for (const auto& each : opening->references_) {
      if (reaching.has(each.edge->node())) return opening->describe();
    }
  }
  for (const Look* look : looks_) {
    if (look->is_at(reaching)) return "a look at the nodes";
  }
  return {};
}

// Once none of what reaches the node comes or goes new requests are held back.
void Graph::Drain::begin(const Node* node, base::Clock::time_point until) {
  for (bool last = false;;) {
    Editing editing(graph_.editing_);
    std::unique_lock lock(graph_.mutex_);
    reaching_ = std::make_unique<const Reaching>(graph_, node);
    const std::string what = graph_.in_the_way(*reaching_);
    if (what.empty()) {
      for (Handle::Root* root : graph_.roots_) {
        if (reaching_->has(root->edge.node())) held_.push_back(root);
      }
      graph_.drained_.push_back(reaching_.get());
      for (Handle::Root* root : held_) root->hold();
      return;
    }
    if (last) throw Error(ETIMEDOUT, what + " does not end");
    editing.unlock();
    last =
        !graph_.gone_.wait_until(lock, until, "nodes that are being opened, closed or looked at");
  }
}

void Graph::Drain::let_go() noexcept {
  // First: from then on they may go.
  for (Handle::Root* root : held_) root->let_go();
  const std::lock_guard lock(graph_.mutex_);
  std::erase(graph_.drained_, reaching_.get());
  graph_.gone_.notify_all();
}

// Under mutex_.
bool Graph::is_drained(const Node& node) const {
  return std::any_of(drained_.begin(), drained_.end(),
                     [&](const Reaching* each) { return each->has(node); });
}

// Under mutex_ and editing_, which are let go of meanwhile. Whatever was found before may be gone.
void Graph::wait_for_drain(Editing& editing, std::unique_lock<std::mutex>& lock) {
  editing.unlock();
  gone_.wait(lock, "the end of a drain");
  lock.unlock();
  editing.lock();
}

// Under editing_: no drain of it begins as long as that is kept from then on. Throws ENOENT.
std::shared_ptr<Node> Graph::find_undrained(Editing& editing, const std::string& node_name) {
  for (;;) {
    std::shared_ptr<Node> node = find(node_name);
    std::unique_lock lock(mutex_);
    if (!is_drained(*node)) return node;
    node.reset();  // the graph has it
    wait_for_drain(editing, lock);
  }
}

// --- who looks at nodes ---

Graph::Look::Look(Graph& graph) : graph_(graph) {
  const std::lock_guard lock(graph_.mutex_);
  for (const Entry& entry : graph_.nodes_) nodes_.push_back(entry.node);
  for (const auto& node : nodes_) which_.push_back(node.get());
  graph_.looks_.push_back(this);
}

Graph::Look::~Look() {
  nodes_.clear();  // before whoever closes one goes on: its file is to be free then
  const std::lock_guard lock(graph_.mutex_);
  std::erase(graph_.looks_, this);
  graph_.gone_.notify_all();
}

Node* Graph::Look::next() {
  std::unique_lock lock(graph_.mutex_);
  at_ = nullptr;
  graph_.gone_.notify_all();
  if (done_ == nodes_.size()) return nullptr;
  Node& node = *nodes_[done_++];
  while (graph_.is_drained(node)) graph_.gone_.wait(lock, "the end of a drain");
  at_ = &node;
  return at_;
}

bool Graph::Look::has(const Node* node) const noexcept {
  return std::find(which_.begin(), which_.end(), node) != which_.end();
}

bool Graph::Look::is_at(const Reaching& reaching) const noexcept {
  return at_ != nullptr && reaching.has(*at_);
}

void Graph::look(const std::function<void(Node&)>& look) {
  Look all(*this);
  while (Node* const node = all.next()) look(*node);
}

// Under mutex_.
bool Graph::looked_at(const Node* node) const {
  return std::any_of(looks_.begin(), looks_.end(),
                     [node](const Look* each) { return each->has(node); });
}

}  // namespace minivmm::block
