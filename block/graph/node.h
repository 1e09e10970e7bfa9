// SPDX-License-Identifier: Apache-2.0
// A node of the block graph: a file, an image format, a filter, a network client.
//
// Drivers derive from Node and implement the driver_* methods. Nobody but Edge calls those, and
// Edge has checked the request before: so a driver may rely on
//  - offset and length inside the node, length > 0, a whole number of
//    `limits().request_alignment` (padding to it may reach past an unaligned end), at most
//    `limits().max_transfer`; writes reach past the end only through an edge with the resize
//    permission, and then make the node grow;
//  - iov.bytes() being the length;
//  - no write, zero, discard or truncate reaching a read-only node.
//
// Threads: every driver_* method runs on a fiber, on any loop, many at once. A driver protects its
// own state, holds no lock across I/O, and never touches a write's buffers twice without copying
// (they may be guest memory, which changes under us).
//
// Durability: a write that returned before a flush was issued, through whatever edge, is durable
// when that flush returns.
//
// Errors: base::Error with an errno that a front end can pass on. After an error the content of
// the range of a failed write is undefined (old, new or a mixture by request_alignment), of
// everything else unchanged.
//
// Life: shared_ptr; edges are strong downward. close() is called once, on a fiber, when no user is
// left; the destructor only frees memory.
#pragma once

#include <string>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "block/graph/permissions.h"
#include "block/graph/request_tracker.h"
#include "block/graph/types.h"

namespace minivmm::block {

class DirtyBitmaps;
class Edge;
class Loan;
class Snapshots;

class Node : public std::enable_shared_from_this<Node> {
 public:
  Node(std::string node_name, const char* driver, bool read_only);
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;
  virtual ~Node();

  const std::string& name() const noexcept { return name_; }
  const char* driver() const noexcept { return driver_; }
  bool read_only() const noexcept { return read_only_; }
  // Every write of a front end is to be durable when it returns (cache=writethrough).
  bool write_through() const noexcept { return write_through_; }
  void set_write_through(bool on) noexcept { write_through_ = on; }
  // Bytes; never more than kMaxDiskSize. May grow while requests run.
  uint64_t size() const noexcept { return size_.load(std::memory_order_acquire); }
  const Limits& limits() const noexcept { return limits_; }

  // "'disk0' (qcow2, /srv/overlay.qcow2)": how messages name it.
  std::string describe() const;
  // The host file behind this node, if it is one or a format on one; empty otherwise.
  virtual std::string filename() const { return {}; }
  // Driver-specific facts for `image info`. May do I/O.
  virtual Facts facts() const { return {}; }
  // What it holds in memory, for state dumps; empty: nothing to speak of. Any thread; no I/O.
  virtual std::string state() const { return {}; }
  // Direct children, all of them, top first (file, then backing), for walks. Only stable under a
  // drain, or while the graph is not edited.
  virtual std::vector<Edge*> children() { return {}; }

  // What remembers which parts were written; nullptr where the node has no such thing.
  virtual DirtyBitmaps* dirty_bitmaps() noexcept { return nullptr; }

  // The snapshots inside it; nullptr where there can be none.
  virtual Snapshots* snapshots() noexcept { return nullptr; }

  // Counters for state dumps. Any thread.
  struct Counters {
    std::atomic<uint64_t> errors{0};
  };
  Counters& counters() noexcept { return counters_; }

  // Called before each write, zero and discard of a range, on its fiber; may suspend, may throw
  // to refuse. For jobs (backup copies old data out first). No guard of content: `data` may be
  // guest memory, which can be other bytes when it is written.
  class BeforeWrite {
   public:
    virtual void before_write(uint64_t offset, uint64_t length, IoSpan data) = 0;

   protected:
    ~BeforeWrite() = default;
  };
  // Only while nothing is in flight (under a drain, or before the first user).
  void add_before_write(BeforeWrite& hook);
  void remove_before_write(BeforeWrite& hook) noexcept;

  // Told of changes of content that were made through other handles, after the change and before
  // the request that made it returns, on its fiber; may suspend. For those whose users keep copies
  // (the kernel's page cache above a FUSE file). A failed request counts as a change.
  class ContentWatcher {
   public:
    virtual void content_changed(uint64_t offset, uint64_t length) noexcept = 0;
    // False: content_changed need not be called, which would cost each write something.
    virtual bool wants_content() const noexcept { return true; }
    // The disk was resized through a handle: another's, or one's own.
    virtual void size_changed(uint64_t old_size, uint64_t new_size) noexcept;

   protected:
    ~ContentWatcher() = default;
  };
  // Any thread, also while requests run; one watcher an edge. A watcher may still be called for
  // requests that began before it was removed: the graph shares its ownership.
  void add_watcher(const Edge& edge, std::shared_ptr<ContentWatcher> watcher);
  std::shared_ptr<ContentWatcher> remove_watcher(const Edge& edge) noexcept;
  // Whether one wants to hear of content.
  bool watched() const noexcept { return watched_.load(std::memory_order_seq_cst); }
  // Tells every watcher but that of `by`, through which the change was made. Fiber.
  void content_changed(const Edge& by, uint64_t offset, uint64_t length) noexcept;
  // Tells every watcher. Fiber.
  void size_changed(uint64_t old_size, uint64_t new_size) noexcept;

  // It is about to be closed, and what uses it, too: no other requests come. A driver that waits
  // for somebody else (a server) from now on does so for a bounded time only. Fiber; must not wait.
  // Not to be undone.
  virtual void closing() noexcept {}
  // Flushes and gives up what the node holds. Fiber. Throws the first error; the node is closed
  // all the same. Called by the Graph, parents before children.
  virtual void close() {}

  // The users attached now, as messages name them.
  std::vector<std::string> users() const;

  // Told when the node's image is found corrupt while it is in use: the node's name, what is wrong,
  // and whether it is not written to from then on. On a fiber of any loop; must not wait.
  using CorruptionListener =
      std::function<void(const std::string& node_name, const std::string& text, bool fatal)>;
  // Before the first user.
  void set_corruption_listener(CorruptionListener listener) {
    on_corruption_ = std::move(listener);
  }

  // Where a piece of a range that is copied lies (driver_copy_out).
  using TakePiece = std::function<void(Node& node, uint64_t offset, uint64_t length)>;

 protected:
  friend class Edge;

  virtual void driver_read(uint64_t offset, IoSpan to) = 0;
  virtual void driver_write(uint64_t offset, IoSpan from, WriteFlags flags) = 0;
  // Default: ENOTSUP, and Edge falls back to writing zero buffers unless flags.no_fallback.
  virtual void driver_write_zeroes(uint64_t offset, uint64_t length, ZeroFlags flags);
  // A hint; the content of the range is undefined afterwards only if the driver says so in its
  // own header. Default: does nothing.
  virtual void driver_discard(uint64_t offset, uint64_t length);
  virtual void driver_flush() = 0;
  // Default: all data.
  virtual BlockStatus driver_block_status(uint64_t offset, uint64_t length);
  // Default: ENOTSUP.
  virtual void driver_truncate(uint64_t new_size);
  // Takes room for a range that the caller has just made the node grow by, and that reads as zeroes
  // before and after. kMetadata or kFalloc. Default: the latter by zeroing without a hole, ENOTSUP
  // for the former.
  virtual void driver_preallocate(uint64_t offset, uint64_t length, Preallocation how);
  // Copies within or between nodes without the data passing through this process; the range is
  // inside `from`. Default: ENOTSUP; the caller then reads and writes.
  virtual void driver_copy_range(uint64_t offset, uint64_t length, Edge& from,
                                 uint64_t from_offset);
  // The other side of it: tells `take` where the bytes of a range lie, piece by piece in their
  // order. The pieces stay there while `take` runs. ENOTSUP, at any piece, for what is not stored
  // as it reads. Default: in this node, which `take` knows how to copy from or does not.
  virtual void driver_copy_out(uint64_t offset, uint64_t length, const TakePiece& take);
  // Stores a cluster compressed. Default: ENOTSUP.
  virtual void driver_write_compressed(uint64_t offset, IoSpan from);
  // Where the bytes of a range lie in memory, if they do and reading would give just them; for that
  // the loan has to pin what keeps them there. Does not wait. False: to be read. Default: that.
  virtual bool driver_lend(uint64_t, uint64_t, Loan&) noexcept { return false; }
  // Brings a range near (page cache, copy-on-read). A hint. Default: does nothing.
  virtual void driver_prefetch(uint64_t offset, uint64_t length);
  // A hint: what was written there is not going to be written again soon, so that it may as well be
  // on its way to the device before somebody flushes. Does not wait, and does
  // nothing while one such is under way: the device is behind as it is. Fiber.
  virtual void driver_start_writeback(uint64_t, uint64_t) noexcept {}

  void announce_corruption(const std::string& text, bool fatal) const {
    if (on_corruption_) on_corruption_(name_, text, fatal);
  }
  void set_size(uint64_t size) noexcept { size_.store(size, std::memory_order_release); }
  // Raises the size to at least `size`.
  void grow_size(uint64_t size) noexcept;
  void set_limits(const Limits& limits) noexcept { limits_ = limits; }
  void set_read_only() noexcept { read_only_ = true; }

 private:
  // Used by Edge.
  void count_watchers() noexcept;
  void attach(Edge& edge);
  void detach(Edge& edge) noexcept;
  void run_before_write(uint64_t offset, uint64_t length, IoSpan data);

  const std::string name_;
  const char* const driver_;
  bool read_only_;
  bool write_through_ = false;
  std::atomic<uint64_t> size_{0};
  Limits limits_;
  Counters counters_;
  CorruptionListener on_corruption_;
  std::vector<BeforeWrite*> before_write_;
  // Only used where request_alignment > 1: keeps read-modify-write apart from overlapping writes.
  RequestTracker tracker_;

  std::atomic<bool> watched_{false};
  mutable std::mutex watchers_mutex_;
  std::vector<std::pair<const Edge*, std::shared_ptr<ContentWatcher>>> watchers_;

  mutable std::mutex users_mutex_;
  std::vector<Edge*> users_;  // guarded by users_mutex_
};

}  // namespace minivmm::block
