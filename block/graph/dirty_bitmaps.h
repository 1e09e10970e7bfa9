// SPDX-License-Identifier: Apache-2.0
// The dirty bitmaps that a node keeps: each remembers which parts of the disk were written since
// some moment, for backups of what has changed.
//
// Owned by the node (Node::dirty_bitmaps). Any loop, on fibers. A bitmap that is enabled notes
// every change that begins after the call that enabled (or cleared) it has returned.
#pragma once

#include <string>
#include <string_view>

#include <cstdint>
#include <optional>
#include <vector>

namespace minivmm::block {

class DirtyBitmaps {
 public:
  struct Info {
    std::string name;
    uint64_t granularity = 0;  // bytes, a power of two
    bool enabled = false;
    // It missed changes, or cannot be read: it can be removed and nothing else.
    bool inconsistent = false;
    // What is dirty, in whole granules. Not known of one that was not needed so far (status()).
    std::optional<uint64_t> dirty_bytes = {};
  };
  virtual std::vector<Info> list() const = 0;

  struct Status {
    uint64_t length = 0;
    bool dirty = false;
  };
  // Of a prefix of a range inside the disk: at least one byte, at most `length`. Throws ENOENT, and
  // EINVAL for one that is inconsistent.
  virtual Status status(std::string_view name, uint64_t offset, uint64_t length) = 0;

  // Changes. What is recorded of them in an image reaches it when the node is closed. They throw
  // ENOENT, EEXIST, EINVAL with qemu-img's words; after an error nothing has changed, but a merge
  // may have been done in part. `granularity`: 0 for the one that suits the node.
  virtual void add(std::string_view name, uint64_t granularity, bool enabled) = 0;
  virtual void remove(std::string_view name) = 0;
  virtual void clear(std::string_view name) = 0;
  virtual void set_enabled(std::string_view name, bool enabled) = 0;
  // Adds what is dirty in a bitmap of `from`, a disk of at least the same size.
  virtual void merge(std::string_view name, DirtyBitmaps& from, std::string_view other) = 0;

 protected:
  ~DirtyBitmaps() = default;
};

}  // namespace minivmm::block
