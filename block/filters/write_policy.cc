// SPDX-License-Identifier: Apache-2.0
#include "block/filters/write_policy.h"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/error.h"
#include "block/graph/opening.h"

namespace minivmm::block {
namespace {

// A guest may change its buffers meanwhile: then this is one of the contents that they had.
bool is_all_zero(IoSpan from) noexcept {
  return std::all_of(from.data(), from.data() + from.count(), [](const iovec& part) {
    return base::is_zero({static_cast<const std::byte*>(part.iov_base), part.iov_len});
  });
}

}  // namespace

WritePolicyNode::WritePolicyNode(const NodeConfig& config, std::shared_ptr<Node> file,
                                 const Policy& policy)
    : FilterNode(config, "write-policy", std::move(file)), policy_(policy) {}

void WritePolicyNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  if (!policy_.detect_zeroes || !is_all_zero(from)) {
    return FilterNode::driver_write(offset, from, flags);
  }
  FilterNode::driver_write_zeroes(offset, from.bytes(),
                                  {.fua = flags.fua, .may_unmap = policy_.unmap_detected});
}

void WritePolicyNode::driver_discard(uint64_t offset, uint64_t length) {
  if (policy_.discard) FilterNode::driver_discard(offset, length);
}

std::shared_ptr<Node> open_write_policy(Opening& opening, const NodeConfig& config,
                                        Options& options) {
  const size_t detect = options.take_choice("detect-zeroes", {"off", "on", "unmap"}, 0);
  WritePolicyNode::Policy policy;
  policy.detect_zeroes = detect != 0;
  policy.unmap_detected = detect == 2;
  policy.discard = options.take_choice("discard", {"unmap", "ignore"}, 0) == 0;
  if (policy.unmap_detected && !policy.discard) {
    throw base::Error(EINVAL, "option 'detect-zeroes=unmap' needs discard=unmap");
  }
  return std::make_shared<WritePolicyNode>(
      config, opening.open_child(options, "file", config.read_only), policy);
}

}  // namespace minivmm::block
