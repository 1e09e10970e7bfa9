// SPDX-License-Identifier: Apache-2.0
// What a range of a disk is, layer by layer of its backing chain: as BlockStatus, and whether any
// layer holds it at all, which a status that came through a chain cannot tell.
#pragma once

#include <string>

#include <cstdint>
#include <optional>
#include <vector>

#include "block/graph/edge.h"

namespace minivmm::block {

struct ChainStatus {
  uint64_t length = 0;
  uint32_t depth = 0;  // of the layer that determines the content
  bool data = false;
  bool zero = false;
  bool present = false;  // a layer holds it; otherwise it is zero because none does
  bool compressed = false;
  std::optional<uint64_t> host_offset = std::nullopt;
};

// The edge to a node's backing file, or null.
Edge* backing_edge(Node& node);
// The file that a node's host offsets are in: its external data file, or its own. Empty: none.
std::string data_filename(Node& node);

// The layers of a disk, the uppermost first: the edge that it is used by, then those of its backing
// nodes. Valid while the graph is not edited.
class LayerChain {
 public:
  explicit LayerChain(Edge& disk);

  size_t size() const noexcept { return layers_.size(); }
  Edge& layer(size_t i) const noexcept { return *layers_[i]; }

  // Of a prefix of the range, which is inside the disk. Fiber.
  ChainStatus status(uint64_t offset, uint64_t length) const;

 private:
  std::vector<Edge*> layers_;
};

}  // namespace minivmm::block
