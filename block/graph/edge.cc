// SPDX-License-Identifier: Apache-2.0
#include "block/graph/edge.h"

#include <algorithm>
#include <cerrno>
#include <optional>

#include <fmt/core.h>

#include "base/buffer.h"
#include "base/checked.h"
#include "base/error.h"
#include "base/fresh_stack.h"

namespace minivmm::block {

using base::align_down;
using base::align_up;
using base::Error;
using base::IoList;

namespace {

// The buffer of zeroes behind nodes that cannot write zeroes themselves.
constexpr size_t kZeroBuffer = 64 * 1024;
alignas(4096) const std::byte kZeroes[kZeroBuffer] = {};

// Counts a failure on the node whose request it was.
class CountErrors {
 public:
  explicit CountErrors(Node& node) noexcept : node_(node) {}
  ~CountErrors() {
    if (!passed_) node_.counters().errors.fetch_add(1, std::memory_order_relaxed);
  }
  CountErrors(const CountErrors&) = delete;
  CountErrors& operator=(const CountErrors&) = delete;
  void passed() noexcept { passed_ = true; }

 private:
  Node& node_;
  bool passed_ = false;
};

// A request of the node: its failure is counted, and it has stack enough for the layers below.
template <typename Request>
void run_counted(Node& node, Request&& request) {
  CountErrors count(node);
  base::run_with_stack(request);
  count.passed();
}

}  // namespace

// What a change without a read-modify-write holds while it runs.
class Edge::SharedRange {
 public:
  SharedRange(Edge& edge, uint64_t offset, uint64_t length) {
    if (edge.node_->limits().request_alignment == 1) return;
    range_.emplace(edge.node_->tracker_, offset, length, false);
  }

 private:
  std::optional<RequestTracker::Range> range_;
};

Edge::Edge(std::shared_ptr<Node> node, std::string user, Permissions permissions, EdgeKind kind)
    : node_(std::move(node)), user_(std::move(user)), permissions_(permissions), kind_(kind) {
  node_->attach(*this);
}

Edge::~Edge() {
  (void)node_->remove_watcher(*this);
  node_->detach(*this);
}

void Edge::replace(std::shared_ptr<Node> node) {
  if (node == node_) return;
  node->attach(*this);
  node_->detach(*this);
  if (auto watcher = node_->remove_watcher(*this)) node->add_watcher(*this, std::move(watcher));
  node_ = std::move(node);
}

void Edge::check(uint64_t offset, uint64_t length, Access access, const char* what) const {
  const Node& node = *node_;
  if (access == Access::kChange) {
    if (!permissions_.can_write()) {
      throw Error(EROFS, fmt::format("{}: {} by {}, which did not ask to write", node.describe(),
                                     what, user_));
    }
    if (node.read_only()) {
      throw Error(EROFS, fmt::format("{}: {}: the node is read-only", node.describe(), what));
    }
  }
  if (base::range_fits(offset, length, node.size())) return;
  const bool may_pass = base::range_fits(offset, length, kMaxDiskSize) &&
                        kind_ == EdgeKind::kInner &&
                        (access == Access::kRead || permissions_.can_resize());
  if (may_pass) return;
  throw Error(access == Access::kRead ? EINVAL : ENOSPC,
              fmt::format("{}: {} of {} bytes at {} reaches past the end ({} bytes)",
                          node.describe(), what, length, offset, node.size()));
}

bool Edge::aligned(uint64_t offset, uint64_t length) const noexcept {
  const uint64_t alignment = node_->limits().request_alignment;
  return ((offset | length) & (alignment - 1)) == 0;
}

void Edge::read(uint64_t offset, IoSpan to) {
  if (to.bytes() == 0) return;
  check(offset, to.bytes(), Access::kRead, "read");
  base::run_with_stack([&] { read_inside(offset, to); });
}

void Edge::read_inside(uint64_t offset, IoSpan to) {
  const uint64_t size = node_->size();
  if (offset + to.bytes() > size) [[unlikely]] {
    const uint64_t inside = offset < size ? size - offset : 0;
    base::fill_zero(to, inside, to.bytes() - inside);
    if (inside == 0) return;
    IoList head;
    read_unaligned(offset, base::slice(to, 0, inside, head));
    return;
  }
  const uint64_t most = node_->limits().max_transfer;
  if (aligned(offset, to.bytes()) && (most == 0 || to.bytes() <= most)) [[likely]] {
    CountErrors count(*node_);
    node_->driver_read(offset, to);
    count.passed();
    return;
  }
  read_unaligned(offset, to);
}

// In pieces of at most max_transfer; the unaligned first and last block through a bounce buffer.
void Edge::read_unaligned(uint64_t offset, IoSpan to) {
  const uint64_t alignment = node_->limits().request_alignment;
  const uint64_t most = node_->limits().max_transfer != 0
                            ? align_down<uint64_t>(node_->limits().max_transfer, alignment)
                            : ~uint64_t{0};
  CountErrors count(*node_);
  base::Buffer bounce;
  for (uint64_t done = 0; done < to.bytes();) {
    const uint64_t at = offset + done;
    const uint64_t left = to.bytes() - done;
    if (at % alignment != 0 || left < alignment) {
      if (bounce.size() == 0) bounce = base::Buffer(alignment);
      const uint64_t block = align_down(at, alignment);
      node_->driver_read(block, bounce.io());
      const uint64_t piece = std::min(left, block + alignment - at);
      base::copy_to(to, done, bounce.span().subspan(at - block, piece));
      done += piece;
      continue;
    }
    const uint64_t piece = std::min(align_down(left, alignment), most);
    IoList list;
    node_->driver_read(at, base::slice(to, done, piece, list));
    done += piece;
  }
  count.passed();
}

void Edge::write(uint64_t offset, IoSpan from, WriteFlags flags) {
  if (from.bytes() == 0) return;
  check(offset, from.bytes(), Access::kChange, "write");
  if (kind_ == EdgeKind::kRoot && node_->write_through()) flags.fua = true;
  if (!node_->before_write_.empty()) node_->run_before_write(offset, from.bytes(), from);
  const uint64_t most = node_->limits().max_transfer;
  const bool plain = node_->limits().request_alignment == 1 &&
                     (most == 0 || from.bytes() <= most) && !base::stack_is_low();
  if (plain) [[likely]] {
    CountErrors count(*node_);
    node_->driver_write(offset, from, flags);
    count.passed();
    return;
  }
  base::run_with_stack([&] { write_slow(offset, from, flags); });
}

void Edge::write_slow(uint64_t offset, IoSpan from, WriteFlags flags) {
  const uint64_t alignment = node_->limits().request_alignment;
  CountErrors count(*node_);
  if (alignment == 1) {
    write_pieces(offset, from, flags);
  } else {
    const uint64_t begin = align_down(offset, alignment);
    const uint64_t end = align_up(offset + from.bytes(), alignment);
    const bool whole = aligned(offset, from.bytes());
    const RequestTracker::Range range(node_->tracker_, begin, end - begin, !whole);
    if (whole) {
      write_pieces(offset, from, flags);
    } else {
      write_padded(offset, from, flags);
    }
  }
  count.passed();
}

void Edge::write_pieces(uint64_t offset, IoSpan from, WriteFlags flags) {
  const uint64_t alignment = node_->limits().request_alignment;
  const uint64_t most = node_->limits().max_transfer != 0
                            ? align_down<uint64_t>(node_->limits().max_transfer, alignment)
                            : ~uint64_t{0};
  for (uint64_t done = 0; done < from.bytes();) {
    const uint64_t piece = std::min(from.bytes() - done, most);
    IoList list;
    node_->driver_write(offset + done, base::slice(from, done, piece, list), flags);
    done += piece;
  }
}

// Read-modify-write of the first and the last block. The range is ours alone (write_slow).
void Edge::write_padded(uint64_t offset, IoSpan from, WriteFlags flags) {
  const uint64_t alignment = node_->limits().request_alignment;
  const uint64_t begin = align_down(offset, alignment);
  const uint64_t end = align_up(offset + from.bytes(), alignment);
  const uint64_t last_block = end - alignment;
  const uint64_t size = node_->size();
  const auto load = [&](base::Buffer& buffer, uint64_t at) {
    buffer = base::Buffer(alignment);
    if (at >= size) {
      std::memset(buffer.data(), 0, alignment);
    } else {
      node_->driver_read(at, buffer.io());
    }
  };
  base::Buffer head;
  base::Buffer tail;
  const uint64_t before = offset - begin;
  const uint64_t after = end - (offset + from.bytes());
  if (before != 0 || begin == last_block) load(head, begin);
  if (after != 0 && begin != last_block) load(tail, last_block);
  IoList list;
  if (before != 0) list.add(head.data(), before);
  list.add(from);
  if (after != 0) {
    base::Buffer& source = begin == last_block ? head : tail;
    list.add(source.data() + (alignment - after), after);
  }
  write_pieces(begin, list, flags);
}

void Edge::write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags) {
  if (length == 0) return;
  check(offset, length, Access::kChange, "write zeroes");
  if (kind_ == EdgeKind::kRoot && node_->write_through()) flags.fua = true;
  if (!node_->before_write_.empty()) node_->run_before_write(offset, length, {});
  run_counted(*node_, [&] {
    if (node_->limits().request_alignment == 1) {
      zero_aligned(offset, length, flags);
    } else {
      zero_padded(offset, length, flags);
    }
  });
}

// Unaligned ends are written, the whole blocks between them are zeroed.
void Edge::zero_padded(uint64_t offset, uint64_t length, ZeroFlags flags) {
  const uint64_t alignment = node_->limits().request_alignment;
  const uint64_t begin = align_down(offset, alignment);
  const uint64_t end = align_up(offset + length, alignment);
  const RequestTracker::Range range(node_->tracker_, begin, end - begin, !aligned(offset, length));
  const uint64_t first_whole = std::min(align_up(offset, alignment), offset + length);
  const uint64_t last_whole = std::max(align_down(offset + length, alignment), first_whole);
  const auto write_end = [&](uint64_t at, uint64_t n) {
    if (n == 0) return;
    const base::SingleBuffer zeroes(static_cast<const void*>(kZeroes), n);
    write_padded(at, zeroes, {.fua = flags.fua});
  };
  write_end(offset, first_whole - offset);
  if (last_whole > first_whole) zero_aligned(first_whole, last_whole - first_whole, flags);
  write_end(last_whole, offset + length - last_whole);
}

void Edge::zero_aligned(uint64_t offset, uint64_t length, ZeroFlags flags) {
  try {
    node_->driver_write_zeroes(offset, length, flags);
    return;
  } catch (const Error& e) {
    if (e.err() != ENOTSUP || flags.no_fallback) throw;
  }
  zero_by_writing(offset, length, flags.fua);
}

void Edge::zero_by_writing(uint64_t offset, uint64_t length, bool durable) {
  // Many times the same buffer: one gathered write covers 512 KiB. Of several, one flush makes all
  // durable.
  const bool several = length > IoList::kInline * kZeroBuffer;
  const WriteFlags flags{.fua = durable && !several};
  while (length > 0) {
    IoList list;
    uint64_t piece = 0;
    while (piece < length && list.count() < IoList::kInline) {
      const uint64_t n = std::min<uint64_t>(kZeroBuffer, length - piece);
      list.add(const_cast<std::byte*>(kZeroes), n);
      piece += n;
    }
    write_pieces(offset, list, flags);
    offset += piece;
    length -= piece;
  }
  if (durable && several) node_->driver_flush();
}

void Edge::discard(uint64_t offset, uint64_t length) {
  if (length == 0) return;
  check(offset, length, Access::kChange, "discard");
  const Limits& limits = node_->limits();
  if (!limits.can_discard) return;
  // A hint: shrink to what the node can discard whole.
  const uint64_t granularity =
      std::max<uint64_t>(limits.request_alignment, limits.discard_granularity);
  const uint64_t size = node_->size();
  const uint64_t end = std::min(offset + length, size);
  const uint64_t first = base::div_ceil(offset, granularity) * granularity;
  // The short last block of a node counts as whole.
  const uint64_t last = end == size ? end : end / granularity * granularity;
  if (first >= last) return;
  if (!node_->before_write_.empty()) node_->run_before_write(first, last - first, {});
  run_counted(*node_, [&] {
    const SharedRange range(*this, first, last - first);
    node_->driver_discard(first, last - first);
  });
}

void Edge::flush() {
  if (node_->read_only()) return;
  run_counted(*node_, [&] { node_->driver_flush(); });
}

BlockStatus Edge::block_status(uint64_t offset, uint64_t length) {
  check(offset, length, Access::kRead, "block status");
  if (length == 0) return {};
  const uint64_t size = node_->size();
  if (offset >= size) return {.length = length, .zero = true};
  const uint64_t inside = std::min(length, size - offset);
  BlockStatus status;
  base::run_with_stack([&] { status = node_->driver_block_status(offset, inside); });
  status.length = std::clamp<uint64_t>(status.length, 1, inside);
  if (status.allocated) status.held = true;
  return status;
}

void Edge::truncate(uint64_t new_size) {
  if (!permissions_.can_resize() && kind_ == EdgeKind::kInner) {
    throw Error(EPERM, fmt::format("{}: {} may not resize it", node_->describe(), user_));
  }
  if (node_->read_only()) {
    throw Error(EROFS, fmt::format("{}: resize: the node is read-only", node_->describe()));
  }
  if (new_size > kMaxDiskSize) {
    throw Error(EFBIG, fmt::format("{}: {} bytes is larger than any disk may be ({})",
                                   node_->describe(), new_size, kMaxDiskSize));
  }
  run_counted(*node_, [&] { node_->driver_truncate(new_size); });
}

void Edge::preallocate(uint64_t offset, uint64_t length, Preallocation how) {
  if (length == 0 || how == Preallocation::kOff) return;
  check(offset, length, Access::kChange, "preallocate");
  if (how != Preallocation::kFull) {
    try {
      run_counted(*node_, [&] { node_->driver_preallocate(offset, length, how); });
      return;
    } catch (const Error& e) {
      if (e.err() != ENOTSUP || how == Preallocation::kMetadata) throw;
    }
  }
  const base::SingleBuffer zeroes(static_cast<const void*>(kZeroes), kZeroBuffer);
  for (uint64_t done = 0; done < length; done += kZeroBuffer) {
    IoList list;
    write(offset + done, base::slice(zeroes, 0, std::min(kZeroBuffer, length - done), list));
  }
}

void Edge::copy_range(uint64_t offset, uint64_t length, Edge& from, uint64_t from_offset) {
  if (length == 0) return;
  check(offset, length, Access::kChange, "copy");
  from.check(from_offset, length, Access::kRead, "copy");
  if (!aligned(offset, length) || !from.aligned(from_offset, length) ||
      !base::range_fits(from_offset, length, from.size())) {
    throw Error(ENOTSUP, "copy range: not supported for this range");
  }
  if (!node_->before_write_.empty()) node_->run_before_write(offset, length, {});
  run_counted(*node_, [&] {
    const SharedRange range(*this, offset, length);
    node_->driver_copy_range(offset, length, from, from_offset);
  });
}

void Edge::copy_out(uint64_t offset, uint64_t length, const Node::TakePiece& take) {
  if (length == 0) return;
  check(offset, length, Access::kRead, "copy");
  if (!base::range_fits(offset, length, size())) {
    throw Error(ENOTSUP, "copy range: what lies past the end is not stored");
  }
  base::run_with_stack([&] { node_->driver_copy_out(offset, length, take); });
}

void Edge::write_compressed(uint64_t offset, IoSpan from) {
  if (from.bytes() == 0) return;
  check(offset, from.bytes(), Access::kChange, "write compressed");
  if (!node_->before_write_.empty()) node_->run_before_write(offset, from.bytes(), from);
  const bool durable = kind_ == EdgeKind::kRoot && node_->write_through();
  run_counted(*node_, [&] {
    node_->driver_write_compressed(offset, from);
    if (durable) node_->driver_flush();
  });
}

void Edge::prefetch(uint64_t offset, uint64_t length) {
  check(offset, length, Access::kRead, "prefetch");
  const uint64_t size = node_->size();
  if (length == 0 || offset >= size) return;
  base::run_with_stack([&] { node_->driver_prefetch(offset, std::min(length, size - offset)); });
}

// What is not a plain range of the disk is read, and errors are found by that.
bool Edge::lend(uint64_t offset, uint64_t length, Loan& to) noexcept {
  return length > 0 && base::range_fits(offset, length, node_->size()) && aligned(offset, length) &&
         !base::stack_is_low() && node_->driver_lend(offset, length, to);
}

}  // namespace minivmm::block
