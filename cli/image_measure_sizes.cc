// SPDX-License-Identifier: Apache-2.0
#include "cli/image_measure_sizes.h"

#include "base/checked.h"

namespace minivmm::cli {

using base::align_up;
using base::div_ceil;

namespace {

// Clusters of refcount blocks and of the table of them, which count themselves, too.
uint64_t refcount_clusters(uint64_t clusters, const Qcow2Shape& shape) {
  const uint64_t per_block = shape.cluster_size * 8 / shape.refcount_bits;
  const uint64_t per_table_cluster = shape.cluster_size / 8;
  uint64_t blocks = 0;
  uint64_t table = 0;
  for (;;) {
    const uint64_t needed = div_ceil(clusters + blocks + table, per_block);
    const uint64_t needed_table = div_ceil(needed, per_table_cluster);
    if (needed == blocks && needed_table == table) return blocks + table;
    blocks = needed;
    table = needed_table;
  }
}

}  // namespace

uint64_t full_qcow2_size(uint64_t size, const Qcow2Shape& shape) {
  const uint64_t cluster = shape.cluster_size;
  const uint64_t data = align_up(size, cluster);
  const uint64_t l2_entry = shape.extended_l2 ? 16 : 8;
  const uint64_t l2_bytes = align_up(data / cluster, cluster / l2_entry) * l2_entry;
  const uint64_t l1_bytes = align_up(l2_bytes / cluster, cluster / 8) * 8;
  const uint64_t before = cluster + l2_bytes + l1_bytes + data;
  // As qemu-img: the LUKS header's own refcounts fit into what the others leave.
  return before + refcount_clusters(before / cluster, shape) * cluster +
         align_up(shape.luks_bytes, cluster);
}

}  // namespace minivmm::cli
