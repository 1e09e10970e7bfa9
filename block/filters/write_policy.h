// SPDX-License-Identifier: Apache-2.0
// Driver `write-policy`: what becomes of zeroes and of discarded ranges on their way to the file,
// as QEMU's options of these names have it. Options: file,
//   detect-zeroes=off|on|unmap  a write of nothing but zeroes is done as write zeroes; with `unmap`
//                               what is below may punch holes for it
//   discard=unmap|ignore        `ignore`: nothing is discarded
#pragma once

#include <memory>

#include "block/filters/filter_node.h"

namespace minivmm::block {

class WritePolicyNode final : public FilterNode {
 public:
  struct Policy {
    bool detect_zeroes = false;
    bool unmap_detected = false;
    bool discard = true;
  };
  WritePolicyNode(const NodeConfig& config, std::shared_ptr<Node> file, const Policy& policy);

 private:
  void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) override;
  void driver_discard(uint64_t offset, uint64_t length) override;

  const Policy policy_;
};

// Throws EINVAL for detect-zeroes=unmap where discard=ignore.
std::shared_ptr<Node> open_write_policy(Opening& opening, const NodeConfig& config,
                                        Options& options);

}  // namespace minivmm::block
