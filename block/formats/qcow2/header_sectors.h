// SPDX-License-Identifier: Apache-2.0
// In which order the sectors of a header are rewritten, so that a power loss between any two of
// them leaves a header that reads as the old one or the new one. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace minivmm::block::qcow2 {

inline constexpr size_t kHeaderSector = 512;

// The sectors in which `wanted` differs from `now` (first clusters, of one length) in such an
// order; nothing if neither upwards nor downwards does it. What a header says of bitmaps may be the
// one or the other.
std::optional<std::vector<size_t>> sound_sector_order(std::span<const std::byte> now,
                                                      std::span<const std::byte> wanted,
                                                      uint64_t file_size);

}  // namespace minivmm::block::qcow2
