// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/meta_context.h"

#include <utility>

#include "nbd-server/wire.h"

namespace minivmm::nbd {
namespace {

uint32_t base_allocation(const block::BlockStatus& block) noexcept {
  return (block.data ? 0 : wire::kStateHole) | (block.zero ? wire::kStateZero : 0);
}

// In how many layers above the content lies: 1 for the exported node, 2 for its backing file; 0
// where no layer has any.
uint32_t allocation_depth(const block::BlockStatus& block) noexcept {
  return block.held ? block.depth + 1 : 0;
}

}  // namespace

std::vector<MetaContext> meta_contexts(block::Handle& node) {
  std::vector<MetaContext> out = {{"base:allocation", 1, &base_allocation},
                                  {"qemu:allocation-depth", 2, &allocation_depth}};
  for (block::DirtyBitmaps::Info& each : node.dirty_bitmaps()) {
    std::string name = "qemu:dirty-bitmap:" + each.name;
    const bool sayable = name.size() <= wire::kMaxString && name.find('\0') == name.npos;
    if (each.inconsistent || !sayable) continue;
    const auto id = static_cast<uint32_t>(out.size() + 1);
    out.push_back({std::move(name), id, nullptr, std::move(each.name)});
  }
  return out;
}

bool is_listed_by(const MetaContext& context, std::string_view query) noexcept {
  return context.name == query || (query.ends_with(':') && context.name.starts_with(query));
}

}  // namespace minivmm::nbd
