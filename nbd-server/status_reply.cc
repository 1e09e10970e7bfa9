// SPDX-License-Identifier: Apache-2.0
// Commands' answers to BLOCK_STATUS.
#include <algorithm>
#include <utility>
#include <vector>

#include "nbd-server/commands.h"

namespace minivmm::nbd {
namespace {

// Bounds for one reply, however fragmented the node is: extents of a context, and of all together.
constexpr size_t kMaxExtents = 2048;
constexpr size_t kMaxAllExtents = 4096;
constexpr unsigned kMaxStatusCalls = 4096;

// What is told of one context: adjacent parts with the same status are one extent.
struct Extents {
  const MetaContext* context;
  std::vector<std::pair<uint64_t, uint32_t>> list = {};  // length, status

  // False: it would be one more than `most`.
  bool add(uint64_t length, uint32_t status, size_t most) {
    if (!list.empty() && list.back().second == status) {
      list.back().first += length;
    } else if (list.size() < most) {
      list.emplace_back(length, status);
    } else {
      return false;
    }
    return true;
  }
};

// The contexts that follow from the node's block status; they are asked together. They may disagree
// on where an extent ends, so each merges on its own, and all stop where the first one is full.
void ask_allocation(block::Handle& node, const Request& request, size_t most,
                    std::vector<Extents>& all) {
  bool full = false;
  unsigned calls = 0;
  for (uint64_t at = request.head.offset; at < request.end() && !full && calls < kMaxStatusCalls;
       ++calls) {
    const block::BlockStatus status = node.block_status(at, request.end() - at);
    const uint64_t length = std::min(status.length, request.end() - at);
    for (Extents& each : all) {
      if (each.context->status == nullptr) continue;
      full |= !each.add(length, each.context->status(status), most);
    }
    at += length;
  }
}

void ask_bitmap(block::Handle& node, const Request& request, size_t most, Extents& out) {
  unsigned calls = 0;
  for (uint64_t at = request.head.offset; at < request.end() && calls < kMaxStatusCalls; ++calls) {
    const auto status = node.dirty_status(out.context->bitmap, at, request.end() - at);
    if (!out.add(status.length, status.dirty ? 1 : 0, most)) return;
    at += status.length;
  }
}

}  // namespace

uint64_t Commands::room_for_status(const wire::Request& head) const noexcept {
  const size_t contexts = std::max<size_t>(agreed_.contexts.size(), 1);
  const bool one = (head.flags & wire::kReqOne) != 0;
  const size_t most = one ? contexts : std::min(contexts * kMaxExtents, kMaxAllExtents);
  return BufferPool::room_for(most * wire::extent_size(agreed_.extended()));
}

void Commands::block_status(Request& request) {
  std::vector<Extents> all;
  bool allocation = false;
  for (size_t i = 0; i < agreed_.contexts.size(); ++i) {
    if ((request.contexts & (uint32_t{1} << i)) == 0) continue;
    all.push_back({&agreed_.contexts[i]});
    allocation |= agreed_.contexts[i].status != nullptr;
  }
  if (all.empty()) return reply_done(request);
  const size_t most =
      request.has(wire::kReqOne) ? 1 : std::min(kMaxExtents, kMaxAllExtents / all.size());
  if (allocation) ask_allocation(node(), request, most, all);
  for (Extents& each : all) {
    if (each.context->status == nullptr) ask_bitmap(node(), request, most, each);
  }

  // One table of extents a context, one behind the other.
  size_t bytes = 0;
  const bool extended = agreed_.extended();
  const size_t extent_size = wire::extent_size(extended);
  for (const Extents& each : all) bytes += each.list.size() * extent_size;
  if (request.buffer.size() < bytes) request.buffer = resources_.buffers().take(bytes);
  std::byte* out = request.buffer.data();
  request.more.resize(all.size() - 1);
  for (size_t i = 0; i < all.size(); ++i) {
    Request::Piece& piece = i == 0 ? request.reply : request.more[i - 1];
    const uint16_t done = i + 1 == all.size() ? wire::kChunkDone : 0;
    piece.header_size = static_cast<uint32_t>(
        wire::encode_status_chunk(piece.header.data(), answered(request), done, all[i].context->id,
                                  static_cast<uint32_t>(all[i].list.size())));
    piece.data = out;
    piece.data_size = static_cast<uint32_t>(all[i].list.size() * extent_size);
    for (const auto& [length, value] : all[i].list) {
      wire::encode_extent(out, extended, length, value);
      out += extent_size;
    }
  }
  request.rereadable = true;
}

}  // namespace minivmm::nbd
