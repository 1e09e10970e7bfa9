// SPDX-License-Identifier: Apache-2.0
// A user's way into a node, and the one checked choke point: every request to a node, from a front
// end or from the node above, passes here. It validates range, permission and alignment, cuts
// requests to the node's limits, pads unaligned ones by read-modify-write, and falls back to
// buffers of zeroes.
//
// Owned by the user (a Handle, or the parent node). Attaching checks permissions against the
// node's other users. Requests: on a fiber, any loop, many at once.
#pragma once

#include <string>

#include <cstdint>
#include <memory>

#include "block/graph/node.h"
#include "block/graph/permissions.h"
#include "block/graph/types.h"

namespace minivmm::block {

enum class EdgeKind {
  kRoot,   // requests past the end are errors (EINVAL; writes ENOSPC)
  kInner,  // reads past the end give zeroes, as a short backing file or a sparse tail does
};

class Edge {
 public:
  // Attaches. `user` is how messages name this user: "NBD export 'disk0'", "backing of 'disk0'".
  // Throws EBUSY naming both users on a permission conflict, EROFS for writing to a read-only node.
  Edge(std::shared_ptr<Node> node, std::string user, Permissions permissions,
       EdgeKind kind = EdgeKind::kInner);
  Edge(const Edge&) = delete;
  Edge& operator=(const Edge&) = delete;
  ~Edge();

  Node& node() const noexcept { return *node_; }
  const std::shared_ptr<Node>& shared_node() const noexcept { return node_; }
  const std::string& user() const noexcept { return user_; }
  Permissions permissions() const noexcept { return permissions_; }
  uint64_t size() const noexcept { return node_->size(); }

  // Fiber. The buffers are the caller's until the call returns. Each throws base::Error.
  void read(uint64_t offset, IoSpan to);
  void write(uint64_t offset, IoSpan from, WriteFlags flags = {});
  void write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags = {});
  void discard(uint64_t offset, uint64_t length);
  void flush();
  // Of a prefix of the range: at least one byte, at most `length`.
  BlockStatus block_status(uint64_t offset, uint64_t length);
  void truncate(uint64_t new_size);
  // Takes room for a range that the node has just grown by: truncate() comes before, and nobody
  // else uses the range yet. ENOTSUP where the node knows no such thing.
  void preallocate(uint64_t offset, uint64_t length, Preallocation how);
  // Copies what `from` shows without reading it into this process. ENOTSUP where the nodes cannot,
  // which some of the range may be found to be after others were copied: copy it otherwise then.
  void copy_range(uint64_t offset, uint64_t length, Edge& from, uint64_t from_offset);
  // See Node::driver_copy_out.
  void copy_out(uint64_t offset, uint64_t length, const Node::TakePiece& take);
  void write_compressed(uint64_t offset, IoSpan from);
  void prefetch(uint64_t offset, uint64_t length);
  // See Node::driver_lend. The loan may hold pins also where this is false.
  bool lend(uint64_t offset, uint64_t length, Loan& to) noexcept;
  // See Node::driver_start_writeback.
  void start_writeback(uint64_t offset, uint64_t length) noexcept {
    node_->driver_start_writeback(offset, length);
  }

  // Points the edge at another node. Only under a drain of every root above it.
  void replace(std::shared_ptr<Node> node);

 private:
  enum class Access { kRead, kChange };
  class SharedRange;
  void check(uint64_t offset, uint64_t length, Access access, const char* what) const;
  void read_inside(uint64_t offset, IoSpan to);
  void read_unaligned(uint64_t offset, IoSpan to);
  void write_slow(uint64_t offset, IoSpan from, WriteFlags flags);
  void write_padded(uint64_t offset, IoSpan from, WriteFlags flags);
  void write_pieces(uint64_t offset, IoSpan from, WriteFlags flags);
  void zero_aligned(uint64_t offset, uint64_t length, ZeroFlags flags);
  void zero_padded(uint64_t offset, uint64_t length, ZeroFlags flags);
  void zero_by_writing(uint64_t offset, uint64_t length, bool durable);
  bool aligned(uint64_t offset, uint64_t length) const noexcept;

  std::shared_ptr<Node> node_;
  const std::string user_;
  const Permissions permissions_;
  const EdgeKind kind_;
};

}  // namespace minivmm::block
