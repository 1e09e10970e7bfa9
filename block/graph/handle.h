// SPDX-License-Identifier: Apache-2.0
// A front end's hold on a node: an edge at the root of the graph that can be drained.
//
// Move-only. Requests run on fibers, on any loop, many at once. While the handle is drained new
// requests wait; nothing fails because the graph changes. close() flushes and reports; a handle
// that is destroyed unclosed (unwinding) is given to the graph, which closes it in the background
// and logs what went wrong.
#pragma once

#include <string>
#include <string_view>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/epoch.h"
#include "block/graph/dirty_bitmaps.h"
#include "block/graph/edge.h"
#include "block/graph/loan.h"
#include "block/graph/types.h"

namespace minivmm::block {

class Graph;

class Handle {
 public:
  Handle() = default;
  Handle(Handle&&) noexcept;
  Handle& operator=(Handle&&) noexcept;
  ~Handle();

  explicit operator bool() const noexcept { return root_ != nullptr; }

  // As Edge's. Fiber.
  void read(uint64_t offset, IoSpan to);
  void write(uint64_t offset, IoSpan from, WriteFlags flags = {});
  void write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags = {});
  void discard(uint64_t offset, uint64_t length);
  void flush();
  BlockStatus block_status(uint64_t offset, uint64_t length);
  void prefetch(uint64_t offset, uint64_t length);
  // The bytes of a range where they lie in memory, if they do (loan.h); any holder of a handle may
  // ask at any time. Does not wait. False: nothing is lent; read it. On a loop, fiber or not.
  bool lend(uint64_t offset, uint64_t length, Loan& to) noexcept;
  void truncate(uint64_t new_size);
  // The node's dirty bitmaps (Node::dirty_bitmaps); none where it keeps none.
  std::vector<DirtyBitmaps::Info> dirty_bitmaps();
  // As DirtyBitmaps::status. Throws EINVAL for a range that is not inside the disk.
  DirtyBitmaps::Status dirty_status(std::string_view bitmap, uint64_t offset, uint64_t length);

  uint64_t size() const noexcept;
  bool writable() const noexcept;
  const Limits& limits() const noexcept;
  // "'disk0' (qcow2, /srv/overlay.qcow2)".
  std::string describe() const;
  const std::string& node_name() const noexcept;

  // `watcher` hears of what is written through other handles of the node from now on, until the
  // handle is closed (Node::ContentWatcher). Fiber.
  void watch(std::shared_ptr<Node::ContentWatcher> watcher);

  // Waits for the requests in flight, flushes what was written, detaches. Fiber. Throws the
  // flush's error; the handle is closed all the same. No request begins once it was called.
  void close();

  // The state behind a handle. Owned by the handle; known to the graph for drains.
  class Root;

 private:
  friend class Graph;
  explicit Handle(std::unique_ptr<Root> root) noexcept;
  std::unique_ptr<Root> root_;
};

}  // namespace minivmm::block
