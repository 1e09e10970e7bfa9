// SPDX-License-Identifier: Apache-2.0
#include "block/protocols/null.h"

#include <cerrno>

#include "base/error.h"
#include "base/io.h"

namespace minivmm::block {

NullNode::NullNode(const NodeConfig& config, uint64_t size, std::chrono::nanoseconds latency)
    : Node(config.node_name, "null", config.read_only), latency_(latency) {
  set_size(size);
  set_limits({.can_discard = true, .can_write_zeroes = true});
}

void NullNode::wait() const {
  if (latency_.count() > 0) base::io::sleep_for(latency_);
}

void NullNode::driver_read(uint64_t, IoSpan to) {
  wait();
  base::fill_zero(to, 0, to.bytes());
}

void NullNode::driver_write(uint64_t, IoSpan, WriteFlags) { wait(); }
void NullNode::driver_write_zeroes(uint64_t, uint64_t, ZeroFlags) { wait(); }
void NullNode::driver_discard(uint64_t, uint64_t) { wait(); }
void NullNode::driver_flush() { wait(); }

BlockStatus NullNode::driver_block_status(uint64_t, uint64_t length) {
  return {.length = length, .zero = true, .allocated = true};
}

std::shared_ptr<Node> open_null(Opening&, const NodeConfig& config, Options& options) {
  const uint64_t size = options.take_size("size").value_or(uint64_t{1} << 30);
  if (size > kMaxDiskSize) throw base::Error(EINVAL, "null: size is larger than any disk may be");
  const uint64_t latency = options.take_uint("latency-ns", 0, 0, 3'600'000'000'000);
  return std::make_shared<NullNode>(config, size,
                                    std::chrono::nanoseconds(static_cast<int64_t>(latency)));
}

}  // namespace minivmm::block
