// SPDX-License-Identifier: Apache-2.0
#include "block/formats/raw.h"

#include <algorithm>
#include <cerrno>
#include <mutex>

#include <fmt/core.h>

#include "base/checked.h"
#include "base/error.h"
#include "block/formats/probe.h"
#include "block/graph/opening.h"

namespace minivmm::block {

using base::Error;

RawNode::RawNode(const NodeConfig& config, std::shared_ptr<Node> file, RawRange range, bool probed)
    : Node(config.node_name, "raw", config.read_only),
      file_(std::move(file), fmt::format("raw node '{}'", config.node_name),
            Permissions::format_file(!config.read_only)),
      range_(range),
      guarded_(probed && !config.read_only) {
  const uint64_t whole = file_.size();
  const uint64_t offset = range.offset;
  if (offset > whole) {
    throw Error(EINVAL, fmt::format("{}: offset {} lies past its end ({} bytes)",
                                    file_.node().describe(), offset, whole));
  }
  const uint64_t size = range.size.value_or(whole - offset);
  if (!base::range_fits(offset, size, whole)) {
    throw Error(EINVAL, fmt::format("{}: offset {} and size {} reach past its end ({} bytes)",
                                    file_.node().describe(), offset, size, whole));
  }
  const Limits& below = file_.node().limits();
  Limits limits = below;
  // A range that is not aligned as its file needs is padded by the file's own edge.
  if (offset % below.request_alignment != 0 || size % below.request_alignment != 0) {
    limits.request_alignment = 1;
  }
  set_limits(limits);
  set_size(size);
}

bool RawNode::guards(uint64_t offset) const noexcept { return guarded_ && offset < kProbeBytes; }

void RawNode::require_raw(std::span<const std::byte> beginning) const {
  const std::string_view format = probe_format(beginning);
  if (format == "raw") return;
  throw Error(EPERM,
              fmt::format("{}: this write would make it look like a {} image, and its format was "
                          "only guessed to be raw; say format=raw if that is meant",
                          describe(), format));
}

// A write that begins in the first bytes: they are read once, looked at with what stands beside
// them, and written from the copy.
void RawNode::write_guarded(uint64_t offset, IoSpan from, WriteFlags flags) {
  const std::lock_guard only_one(beginning_);
  std::byte first[kProbeBytes] = {};
  const uint64_t known = std::min<uint64_t>(kProbeBytes, std::max(size(), offset + from.bytes()));
  const uint64_t copied = std::min(known - offset, from.bytes());
  if (copied != known) file_.read(range_.offset, base::SingleBuffer(first, known));
  base::copy_from(from, 0, {first + offset, copied});
  require_raw({first, known});
  base::IoList list;
  list.add(first + offset, copied);
  list.add_slice(from, copied, from.bytes() - copied);
  file_.write(range_.offset + offset, list, flags);
}

// Writes reach past the end only from a user that may make the node grow.
void RawNode::before_growth(uint64_t end) const {
  if (!range_.size || end <= size()) return;
  throw Error(ENOSPC, fmt::format("{}: its size is fixed by the 'size' option ({} bytes)",
                                  describe(), size()));
}

void RawNode::driver_read(uint64_t offset, IoSpan to) { file_.read(range_.offset + offset, to); }

void RawNode::driver_write(uint64_t offset, IoSpan from, WriteFlags flags) {
  const uint64_t end = offset + from.bytes();
  before_growth(end);
  if (guards(offset)) {
    write_guarded(offset, from, flags);
  } else {
    file_.write(range_.offset + offset, from, flags);
  }
  grow_size(end);
}

void RawNode::driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  before_growth(offset + length);
  if (guards(offset)) {
    // A zero may complete a signature, so these are bytes like any other.
    static constexpr std::byte kZeroes[kProbeBytes] = {};
    const uint64_t piece = std::min<uint64_t>(kProbeBytes - offset, length);
    write_guarded(offset, base::SingleBuffer(kZeroes, piece), {.fua = flags.fua});
    if (piece < length) {
      file_.write_zeroes(range_.offset + offset + piece, length - piece, flags);
    }
  } else {
    file_.write_zeroes(range_.offset + offset, length, flags);
  }
  grow_size(offset + length);
}

void RawNode::driver_discard(uint64_t offset, uint64_t length) {
  // What a discard leaves is not known: the guarded beginning stays as it is.
  const uint64_t kept = guards(offset) ? std::min<uint64_t>(kProbeBytes - offset, length) : 0;
  if (kept < length) file_.discard(range_.offset + offset + kept, length - kept);
}

BlockStatus RawNode::driver_block_status(uint64_t offset, uint64_t length) {
  return file_.block_status(range_.offset + offset, length);
}

void RawNode::driver_truncate(uint64_t new_size) {
  if (range_.size) {
    throw Error(ENOTSUP, fmt::format("{}: its size is fixed by the 'size' option", describe()));
  }
  file_.truncate(range_.offset + new_size);
  set_size(new_size);
}

void RawNode::driver_copy_range(uint64_t offset, uint64_t length, Edge& from,
                                uint64_t from_offset) {
  if (guards(offset)) throw Error(ENOTSUP, "copy range: what is written there has to be looked at");
  before_growth(offset + length);
  file_.copy_range(range_.offset + offset, length, from, from_offset);
  grow_size(offset + length);
}

void RawNode::driver_prefetch(uint64_t offset, uint64_t length) {
  file_.prefetch(range_.offset + offset, length);
}

std::shared_ptr<Node> open_raw(Opening& opening, const NodeConfig& config, Options& options) {
  auto file = opening.open_child(options, "file", config.read_only);
  RawRange range;
  range.offset = options.take_size("offset").value_or(0);
  range.size = options.take_size("size");
  const bool probed = options.take_bool("probed", false);
  return std::make_shared<RawNode>(config, std::move(file), range, probed);
}

}  // namespace minivmm::block
