// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/stored_blocks.h"

#include <algorithm>
#include <optional>
#include <variant>

#include "base/buffer.h"
#include "base/bytes.h"
#include "base/checked.h"
#include "base/log.h"
#include "block/formats/qcow2/l2_entry.h"
#include "block/formats/qcow2/refcount_codec.h"

namespace minivmm::block::qcow2 {
namespace {

// Bytes that the file system has given it.
std::optional<uint64_t> stored_bytes(const Node& file) {
  for (const auto& [name, value] : file.facts()) {
    const auto* number = std::get_if<uint64_t>(&value);
    if (name == "actual-size" && number != nullptr) return *number;
  }
  return std::nullopt;
}

// How many of the first `clusters` have a refcount; no more than `enough` are counted.
uint64_t count_used(ImageFile& image, uint64_t clusters, uint64_t enough) {
  const Geometry& g = image.geometry();
  const Header h = image.header_update().current();
  const uint64_t blocks =
      std::min(base::div_ceil(clusters, g.block_entries()), h.refcount_table_bytes() / 8);
  base::Buffer table(blocks * 8);
  base::Buffer block(g.cluster_size());
  image.file().read(h.refcount_table_offset, table.io());
  uint64_t used = 0;
  for (uint64_t i = 0; i < blocks && used < enough; ++i) {
    const auto place = base::load_be<uint64_t>(table.data() + i * 8);
    if (place == 0 || refcount_table_problem(place, g) != nullptr) continue;
    image.file().read(place, block.io());
    const uint64_t here = std::min(g.block_entries(), clusters - i * g.block_entries());
    for (uint64_t k = 0; k < here; ++k) {
      if (get_refcount(block.data(), k, g.refcount_order) != 0) ++used;
    }
  }
  return used;
}

}  // namespace

bool counts_more_than_stored(ImageFile& image) {
  const std::optional<uint64_t> stored = stored_bytes(image.file().node());
  if (!stored) return false;
  const uint64_t clusters = image.geometry().clusters(image.size());
  const uint64_t blocks = *stored >> image.geometry().cluster_bits;
  const uint64_t enough = std::max(blocks * 10 / 9, blocks + 2);
  if (clusters < enough) return false;
  try {
    return count_used(image, clusters, enough) >= enough;
  } catch (const base::Error& e) {
    base::log_debug("{}: {}", image.name(), e.what());
    return false;
  }
}

}  // namespace minivmm::block::qcow2
