// SPDX-License-Identifier: Apache-2.0
#include "cli/image_convert_bitmaps.h"

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/graph/dirty_bitmaps.h"
#include "cli/image_arguments.h"
#include "cli/image_personality.h"

namespace minivmm::cli {

using base::Error;
using block::DirtyBitmaps;

void check_source_bitmaps(OpenImage& source, bool skip_broken) {
  DirtyBitmaps* const bitmaps = source.edge().node().dirty_bitmaps();
  if (bitmaps == nullptr) throw Error(ENOTSUP, "Source lacks bitmap support");
  for (const DirtyBitmaps::Info& info : bitmaps->list()) {
    if (!info.inconsistent) continue;
    if (!skip_broken) {
      throw Error(EINVAL, fmt::format("Cannot copy inconsistent bitmap '{}'\nTry "
                                      "--skip-broken-bitmaps, or use '{} bitmap --remove' to "
                                      "delete it",
                                      printable(info.name),
                                      personality().drop_in ? "qemu-img" : "minivmm image"));
    }
    print_warning(fmt::format("Skipping inconsistent bitmap '{}'", printable(info.name)));
  }
}

void require_bitmaps(block::Edge& target) {
  const auto* image = dynamic_cast<const block::Qcow2Node*>(&target.node());
  const bool old = image != nullptr && image->header().version < 3;
  if (target.node().dirty_bitmaps() != nullptr && !old) return;
  throw Error(ENOTSUP,
              fmt::format("Format driver '{}' does not support bitmaps", target.node().driver()));
}

void copy_bitmaps(OpenImage& source, block::Edge& target) {
  DirtyBitmaps& from = *source.edge().node().dirty_bitmaps();
  DirtyBitmaps* const to = target.node().dirty_bitmaps();
  for (const DirtyBitmaps::Info& info : from.list()) {
    if (info.inconsistent) continue;
    try {
      if (to == nullptr) throw Error(ENOTSUP, "the target's format has none");
      to->add(info.name, info.granularity, info.enabled);
      to->merge(info.name, from, info.name);
    } catch (Error& e) {
      e.prepend(fmt::format("Failed to copy bitmap '{}'", printable(info.name)));
      throw;
    }
  }
}

}  // namespace minivmm::cli
