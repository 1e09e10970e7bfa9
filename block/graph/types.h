// SPDX-License-Identifier: Apache-2.0
// The vocabulary of requests to a block node. Offsets and lengths are bytes.
#pragma once

#include <string>

#include <cstdint>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "base/iovec.h"

namespace minivmm::block {

using base::IoSpan;

// No disk is larger: what fits QEMU's and Linux's signed offsets, with room to align up.
inline constexpr uint64_t kMaxDiskSize = (uint64_t{1} << 63) - (uint64_t{1} << 30);

struct WriteFlags {
  bool fua = false;  // durable when the call returns, with the metadata that finds it
};

struct ZeroFlags {
  bool fua = false;
  bool may_unmap = false;    // the range may become a hole
  bool no_fallback = false;  // fail with ENOTSUP rather than write zero buffers
};

// What is known of a range. Names as in `qemu-img map`.
struct BlockStatus {
  uint64_t length = 0;     // from the asked offset on, all of it alike; never 0 for a valid request
  bool data = false;       // reading gives data that is stored (here or below)
  bool zero = false;       // reading gives zeroes
  bool allocated = false;  // this layer (not its backing file) determines the content
  bool compressed = false;
  uint32_t depth = 0;  // 0: the node that was asked; n: its n-th backing node holds it
  bool held = false;   // some layer determines the content: that at `depth`. Set by the Edge
  std::optional<uint64_t> host_offset =
      std::nullopt;  // where in the protocol node, when it is stored plainly
};

// What a node can take, stated when it is opened. Requests are cut and padded to it by the Edge.
struct Limits {
  uint32_t request_alignment = 1;    // offsets and lengths of reads and writes; power of two
  uint64_t max_transfer = 0;         // bytes a read or write, 0 = no limit
  uint32_t optimal_io = 0;           // preferred size and alignment, 0 = none
  uint32_t discard_granularity = 0;  // 0 = 1; smaller or unaligned discards may do nothing
  uint32_t compress_unit = 0;        // whole ones can be stored compressed, 0 = nothing can
  bool can_discard = false;
  bool can_write_zeroes = false;  // efficiently, without a buffer of zeroes
};

// What becomes of new space: nothing; the format's own tables; also the host's blocks; also data in
// them.
enum class Preallocation : uint8_t { kOff, kMetadata, kFalloc, kFull };

// Facts for people and tools (`image info`, the state dump), in order.
using FactValue = std::variant<bool, uint64_t, std::string>;
using Facts = std::vector<std::pair<std::string, FactValue>>;

}  // namespace minivmm::block
