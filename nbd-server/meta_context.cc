// SPDX-License-Identifier: Apache-2.0
#include "nbd-server/meta_context.h"

#include <cstddef>

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

constexpr MetaContext kContexts[] = {
    {"base:allocation", &base_allocation},
    {"qemu:allocation-depth", &allocation_depth},
};

}  // namespace

std::span<const MetaContext> meta_contexts() noexcept { return kContexts; }

ContextMask match_list_query(std::string_view query) noexcept {
  if (!query.ends_with(':')) return match_set_query(query);
  ContextMask out = 0;
  for (size_t i = 0; i < std::size(kContexts); ++i) {
    if (kContexts[i].name.starts_with(query)) out |= ContextMask{1} << i;
  }
  return out;
}

ContextMask match_set_query(std::string_view query) noexcept {
  for (size_t i = 0; i < std::size(kContexts); ++i) {
    if (kContexts[i].name == query) return ContextMask{1} << i;
  }
  return 0;
}

}  // namespace minivmm::nbd
