// SPDX-License-Identifier: Apache-2.0
#include "block/filters/filter_node.h"

#include <fmt/core.h>

namespace minivmm::block {

FilterNode::FilterNode(const NodeConfig& config, const char* driver, std::shared_ptr<Node> file)
    : Node(config.node_name, driver, config.read_only),
      file_(std::move(file), fmt::format("{} filter '{}'", driver, config.node_name),
            Permissions::format_file(!config.read_only)) {
  set_size(file_.size());
  Limits limits = file_.node().limits();
  limits.compress_unit = 0;  // not every filter knows that kind of write
  set_limits(limits);
}

void FilterNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  file_.write(offset, from, flags);
  grow_size(offset + from.bytes());
}

void FilterNode::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  file_.write_zeroes(offset, length, flags);
  grow_size(offset + length);
}

void FilterNode::driver_truncate(uint64_t new_size) {
  file_.truncate(new_size);
  set_size(new_size);
}

}  // namespace minivmm::block
