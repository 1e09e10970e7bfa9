// SPDX-License-Identifier: Apache-2.0
// The nodes by which requests come to a node: itself, and all that use it, directly or by way of
// others. Private to the graph. What it was made of is not looked at again.
#pragma once

#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "block/graph/graph.h"

namespace minivmm::block {

class Reaching {
 public:
  // Under the graph's editing_, so that edges stay as they are, and its mutex_. Without a node all
  // of them.
  Reaching(const Graph& graph, const Node* node);

  bool has(const Node& node) const noexcept { return is_all_ || nodes_.contains(&node); }
  // Whether some node is in both.
  bool meets(const Reaching& other) const noexcept;

 private:
  using Parents = std::unordered_map<const Node*, std::vector<const Node*>>;
  static Parents parents_in(const Graph& graph);

  const bool is_all_;
  std::unordered_set<const Node*> nodes_;
};

}  // namespace minivmm::block
