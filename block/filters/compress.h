// SPDX-License-Identifier: Apache-2.0
// Driver `compress`: stores what is written through it compressed, by whole units of the node below
// (clusters of a qcow2 image). A part of a unit is written as it is, which makes that unit a plain
// one: for disks that are written once, in large pieces. Option: file.
//
// One fiber compresses the units of a request one after the other; requests run side by side.
#pragma once

#include <memory>

#include "block/filters/filter_node.h"

namespace minivmm::block {

class CompressNode final : public FilterNode {
 public:
  // Throws ENOTSUP where `file` does not store compressed data.
  CompressNode(const NodeConfig& config, std::shared_ptr<Node> file);

 private:
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_write_compressed(uint64_t offset, IoSpan from) override;
};

std::shared_ptr<Node> open_compress(Opening& opening, const NodeConfig& config, Options& options);

}  // namespace minivmm::block
