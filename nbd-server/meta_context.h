// SPDX-License-Identifier: Apache-2.0
// The metadata contexts that BLOCK_STATUS can report: two of every export, and one for each dirty
// bitmap of its node. Those that a client selects are kept with its agreement; a request names some
// of them by a mask over that list.
#pragma once

#include <string>
#include <string_view>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "block/graph/handle.h"
#include "block/graph/types.h"

namespace minivmm::nbd {

struct MetaContext {
  std::string name;
  uint32_t id = 0;  // on the wire
  // What an extent's status is; null where it is the dirty bitmap `bitmap`'s.
  uint32_t (*status)(const block::BlockStatus& block) noexcept = nullptr;
  std::string bitmap = {};
};

// Fiber. All that clients may select of a node. Bitmaps that are inconsistent are left out.
std::vector<MetaContext> meta_contexts(block::Handle& node);

// What a LIST query (may end in ':' for what begins so) and a SET query (exact names only) select.
// Unknown names select nothing, which is no error.
bool is_listed_by(const MetaContext& context, std::string_view query) noexcept;

// A client may select so many.
inline constexpr size_t kMostContexts = 32;

}  // namespace minivmm::nbd
