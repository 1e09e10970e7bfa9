// SPDX-License-Identifier: Apache-2.0
// Somebody who looks at the nodes, one after the other (Graph::look). Private to the graph.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "block/graph/graph.h"

namespace minivmm::block {

class Graph::Look {
 public:
  explicit Look(Graph& graph);
  ~Look();
  Look(const Look&) = delete;
  Look& operator=(const Look&) = delete;

  // The next node, once no drain is under way that it reaches; null at the end. Until the next call
  // drains wait for it. Fiber.
  Node* next();

  // Under the graph's mutex_.
  bool has(const Node* node) const noexcept;
  bool is_at(const Reaching& reaching) const noexcept;

 private:
  Graph& graph_;
  Nodes nodes_;
  std::vector<const Node*> which_;
  size_t done_ = 0;     // of nodes_
  Node* at_ = nullptr;  // guarded by the graph's mutex_
};

}  // namespace minivmm::block
