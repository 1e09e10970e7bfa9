// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/chain_status.h"

#include <algorithm>

#include "block/formats/qcow2/qcow2_node.h"

namespace minivmm::block {

namespace {

bool has_data_file(Node& node) {
  const auto* qcow2 = dynamic_cast<const Qcow2Node*>(&node);
  return qcow2 != nullptr && qcow2->header().geometry().external_data;
}

}  // namespace

// Children are the file, the external data file, the backing file; of the latter two what there is.
Edge* backing_edge(Node& node) {
  const std::vector<Edge*> children = node.children();
  const size_t at = has_data_file(node) ? 2 : 1;
  return children.size() > at ? children[at] : nullptr;
}

std::string data_filename(Node& node) {
  return has_data_file(node) ? node.children()[1]->node().filename() : node.filename();
}

LayerChain::LayerChain(Edge& disk) {
  for (Edge* edge = &disk; edge != nullptr; edge = backing_edge(edge->node())) {
    layers_.push_back(edge);
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
