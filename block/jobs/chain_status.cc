// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/chain_status.h"

#include <algorithm>

namespace minivmm::block {

LayerChain::LayerChain(Edge& disk) {
  // A format's second child is its backing node, or it has none.
  for (Edge* edge = &disk; edge != nullptr;) {
    layers_.push_back(edge);
    const std::vector<Edge*> children = edge->node().children();
    edge = children.size() > 1 ? children[1] : nullptr;
  }
}

ChainStatus LayerChain::status(uint64_t offset, uint64_t length) const {
  ChainStatus out;
  for (size_t depth = 0; depth < layers_.size(); ++depth) {
    Edge& layer = *layers_[depth];
    // Past the end of a layer it is the layer above that is not held by anyone.
    if (offset >= layer.size()) break;
    out.depth = static_cast<uint32_t>(depth);
    const BlockStatus status = layer.block_status(offset, std::min(length, layer.size() - offset));
    length = out.length = status.length;
    if (!status.allocated && depth + 1 < layers_.size()) continue;
    out.data = status.data;
    out.zero = status.zero;
    out.present = status.allocated;
    out.compressed = status.compressed;
    out.host_offset = status.host_offset;
    return out;
  }
  out.length = length;
  out.zero = true;
  return out;
}

}  // namespace minivmm::block
