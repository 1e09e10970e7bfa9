// SPDX-License-Identifier: Apache-2.0
#include "block/graph/reaching.h"

#include <algorithm>

#include "block/graph/edge.h"
#include "block/graph/opening.h"
#include "block/graph/root.h"

namespace minivmm::block {

// Of all that can be found from above: edges know what they lead to, not where they come from.
Reaching::Parents Reaching::parents_in(const Graph& graph) {
  Parents out;
  std::unordered_set<const Node*> seen;
  std::vector<Node*> open;
  const auto find = [&](Node& node) {
    if (seen.insert(&node).second) open.push_back(&node);
  };
  // First: these are not asked for their children, which they may be letting go of.
  for (const Graph::Closing& each : graph.closing_) seen.insert(each.node.get());
  for (const Graph::Closing& each : graph.closing_) {
    for (const auto& weak : each.children) {
      const std::shared_ptr<Node> child = weak.lock();
      if (!child) continue;
      out[child.get()].push_back(each.node.get());
      find(*child);
    }
  }
  for (const Graph::Entry& entry : graph.nodes_) find(*entry.node);
  for (const Handle::Root* root : graph.roots_) find(root->edge.node());
  for (const Opening* opening : graph.openings_) {
    for (const auto& each : opening->references_) find(each.edge->node());
  }
  while (!open.empty()) {
    Node& node = *open.back();
    open.pop_back();
    for (const Edge* edge : node.children()) {
      out[&edge->node()].push_back(&node);
      find(edge->node());
    }
  }
  return out;
}

Reaching::Reaching(const Graph& graph, const Node* node) : is_all_(node == nullptr) {
  if (is_all_) return;
  const Parents parents = parents_in(graph);
  std::vector<const Node*> open{node};
  nodes_.insert(node);
  while (!open.empty()) {
    const auto found = parents.find(open.back());
    open.pop_back();
    if (found == parents.end()) continue;
    for (const Node* parent : found->second) {
      if (nodes_.insert(parent).second) open.push_back(parent);
    }
  }
}

bool Reaching::meets(const Reaching& other) const noexcept {
  if (is_all_ || other.is_all_) return true;
  return std::any_of(nodes_.begin(), nodes_.end(),
                     [&](const Node* node) { return other.nodes_.contains(node); });
}

}  // namespace minivmm::block
