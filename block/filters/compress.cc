// SPDX-License-Identifier: Apache-2.0
#include "block/filters/compress.h"

#include <algorithm>
#include <cerrno>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "block/graph/opening.h"

namespace minivmm::block {

CompressNode::CompressNode(const NodeConfig& config, std::shared_ptr<Node> file)
    : FilterNode(config, "compress", std::move(file)) {
  const uint32_t unit = this->file().node().limits().compress_unit;
  if (unit == 0 && !config.read_only) {
    throw base::Error(ENOTSUP,
                      fmt::format("compress filter '{}': {} does not store compressed data",
                                  config.node_name, this->file().node().describe()));
  }
  Limits limits = this->limits();
  limits.compress_unit = unit;
  limits.optimal_io = std::max(limits.optimal_io, unit);
  set_limits(limits);
}

void CompressNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  const uint64_t unit = limits().compress_unit;
  const uint64_t end = offset + from.bytes();
  // The last unit of the disk may be short.
  const uint64_t first = std::min(end, base::align_up(offset, unit));
  const uint64_t last = end == size() ? end : std::max(first, base::align_down(end, unit));
  base::IoList list;
  if (offset < first)
    FilterNode::driver_write(offset, base::slice(from, 0, first - offset, list), {});
  if (first < last) {
    base::IoList whole;
    file().write_compressed(first, base::slice(from, first - offset, last - first, whole));
  }
  if (last < end) {
    base::IoList rest;
    FilterNode::driver_write(last, base::slice(from, last - offset, end - last, rest), {});
  }
  if (flags.fua) file().flush();
}

void CompressNode::driver_write_compressed(uint64_t offset, IoSpan from) {
  file().write_compressed(offset, from);
}

std::shared_ptr<Node> open_compress(Opening& opening, const NodeConfig& config, Options& options) {
  return std::make_shared<CompressNode>(config,
                                        opening.open_child(options, "file", config.read_only));
}

}  // namespace minivmm::block
