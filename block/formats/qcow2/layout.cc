// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/layout.h"

namespace minivmm::block::qcow2 {

const char* l1_problem(uint64_t raw, const Geometry& g) noexcept {
  if ((raw & ~(kFlagCopied | kOffsetMask)) != 0) return "reserved bits are set";
  if (g.offset_in_cluster(raw & kOffsetMask) != 0) return "it is not aligned to the cluster size";
  if ((raw & kOffsetMask) == 0 && raw != 0) return "it points to the header";
  return nullptr;
}

const char* refcount_table_problem(uint64_t raw, const Geometry& g) noexcept {
  if ((raw & ~kRefcountOffsetMask) != 0) return "reserved bits are set";
  if (g.offset_in_cluster(raw) != 0) return "it is not aligned to the cluster size";
  if (raw >= kMaxHostOffset) return "it lies past 64 PiB";
  return nullptr;
}

}  // namespace minivmm::block::qcow2
