// SPDX-License-Identifier: Apache-2.0
// How large the file of a new image becomes. Pure arithmetic.
#pragma once

#include <cstdint>

namespace minivmm::cli {

struct Qcow2Shape {
  uint64_t cluster_size = 65536;
  unsigned refcount_bits = 16;
  bool extended_l2 = false;
  uint64_t luks_bytes = 0;  // of the LUKS header; 0: not encrypted
};

// The file of a qcow2 image of `size` bytes in which every cluster is allocated: headers, tables,
// refcounts and data.
uint64_t full_qcow2_size(uint64_t size, const Qcow2Shape& shape);

}  // namespace minivmm::cli
