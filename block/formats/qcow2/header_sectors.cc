// SPDX-License-Identifier: Apache-2.0
#include "block/formats/qcow2/header_sectors.h"

#include <algorithm>

#include "base/error.h"
#include "block/formats/qcow2/header.h"

namespace minivmm::block::qcow2 {
namespace {

using Bytes = std::vector<std::byte>;
using Span = std::span<const std::byte>;

// What a header says but for its bitmaps and the names of features; nothing if it makes no sense.
std::optional<Bytes> meaning(Span first_cluster, uint64_t file_size) {
  try {
    Header h = parse_header(first_cluster, file_size);
    h.bitmaps.reset();
    h.autoclear &= ~kAutoclearBitmaps;
    h.feature_names.clear();
    std::erase_if(h.unknown_extensions,
                  [](const HeaderExtension& e) { return e.type == kExtBitmaps; });
    return serialise_header(h);
  } catch (const base::Error&) {
    return std::nullopt;
  }
}

Span sector_of(Span bytes, size_t sector) {
  const size_t begin = sector * kHeaderSector;
  return bytes.subspan(begin, std::min(kHeaderSector, bytes.size() - begin));
}

}  // namespace

std::optional<std::vector<size_t>> sound_sector_order(Span now, Span wanted, uint64_t file_size) {
  std::vector<size_t> order;
  for (size_t i = (now.size() + kHeaderSector - 1) / kHeaderSector; i-- > 0;) {
    if (!std::ranges::equal(sector_of(now, i), sector_of(wanted, i))) order.push_back(i);
  }
  if (order.size() <= 1) return order;
  const auto before = meaning(now, file_size);
  const auto after = meaning(wanted, file_size);
  for (int direction = 0; direction < 2; ++direction) {
    Bytes state(now.begin(), now.end());
    bool sound = true;
    for (const size_t sector : order) {
      const Span piece = sector_of(wanted, sector);
      std::copy(piece.begin(), piece.end(),
                state.begin() + static_cast<std::ptrdiff_t>(sector * kHeaderSector));
      const auto found = meaning(state, file_size);
      if (!found || (found != before && found != after)) sound = false;
    }
    if (sound) return order;
    std::reverse(order.begin(), order.end());
  }
  return std::nullopt;
}

}  // namespace minivmm::block::qcow2
