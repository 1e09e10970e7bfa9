// SPDX-License-Identifier: Apache-2.0
// The metadata contexts that BLOCK_STATUS can report: one row of the table each. A selection is a
// bit mask over the table; the context's id on the wire is its index plus one.
#pragma once

#include <string_view>

#include <cstdint>
#include <span>

#include "block/graph/types.h"

namespace minivmm::nbd {

struct MetaContext {
  std::string_view name;
  uint32_t (*status)(const block::BlockStatus& block) noexcept;
};

std::span<const MetaContext> meta_contexts() noexcept;

using ContextMask = uint32_t;
// What a LIST query (may end in ':' for the whole namespace) and a SET query (exact names only)
// select. Unknown names select nothing, which is no error.
ContextMask match_list_query(std::string_view query) noexcept;
ContextMask match_set_query(std::string_view query) noexcept;
inline ContextMask all_contexts() noexcept {
  return (ContextMask{1} << meta_contexts().size()) - 1;
}
inline uint32_t context_id(size_t index) noexcept { return static_cast<uint32_t>(index) + 1; }
// Empty for an id that no context has.
inline ContextMask context_of_id(uint32_t id) noexcept {
  return id >= 1 && id <= meta_contexts().size() ? ContextMask{1} << (id - 1) : 0;
}

}  // namespace minivmm::nbd
