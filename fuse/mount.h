// SPDX-License-Identifier: Apache-2.0
// A FUSE mount: a directory that shows each export as one regular file of the disk's size.
//
// Owned by the process's main (or a test) and outlived by its loops and its graph. Requests are
// served on every loop of the group. The files are opened with direct I/O, so that what another
// front end wrote is read at once. Files have a fixed size: writing at the end gives ENOSPC,
// truncating to another size EPERM, creating, renaming and removing EPERM. O_TRUNC is ignored, as
// on a block device. Ordinary writes are durable after fsync; O_SYNC and O_DSYNC are honoured.
//
// All methods run on a fiber, one at a time, unless they say otherwise.
#pragma once

#include <string>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "base/loop_group.h"
#include "block/graph/handle.h"

namespace minivmm::fuse {

struct MountOptions {
  uint32_t mode = 0600;         // of the files; read-only files lose the write bits, the directory
                                // gains an x for each r
  std::optional<uint32_t> uid;  // owner of the files; default: this process's
  std::optional<uint32_t> gid;
  bool allow_other = false;  // users other than the one that mounts may look; without root this
                             // needs user_allow_other in /etc/fuse.conf
};

struct FileOptions {
  bool writable = false;  // the handle must be writable too
};

class Mount {
 public:
  // Touches nothing yet.
  Mount(base::LoopGroup& loops, std::string mountpoint, MountOptions options = {});
  Mount(const Mount&) = delete;
  Mount& operator=(const Mount&) = delete;
  // Any thread but a loop's. Stops first, with a deadline of zero, if that was forgotten.
  ~Mount();

  // Shows `handle` as the file `name`, before or after start(). Throws EINVAL for a name that
  // cannot be a file's ("", ".", "..", with '/' or NUL, longer than 255 bytes), EEXIST for one that
  // is there, EROFS for `writable` on a handle that is not; the handle is then closed unflushed.
  void add_file(const std::string& name, block::Handle handle, FileOptions options = {});
  // Takes the file away: waits for its requests in flight, flushes, closes the handle. Files that
  // are open fail with ENODEV from then on. Throws ENOENT; ETIMEDOUT if that has not ended by the
  // deadline (the handle is closed when it has); or what the flush threw. The file is gone all the
  // same. `only_unused`: throws EBUSY instead where it is open, and nothing has changed.
  void remove_file(const std::string& name, std::chrono::milliseconds deadline,
                   bool only_unused = false);

  // Mounts. The mountpoint must be an empty directory, or not exist: then it is made, and removed
  // by stop(). A mount that a crash of ours left there is detached first; a mount that is alive
  // is refused (EBUSY, naming it). When this returns the files can be used. Throws; nothing is left
  // behind then.
  void start();

  // Unmounts, finishes the requests in flight, flushes and closes the handles. A mount in use is
  // detached with a message: its users get ENOTCONN once this returns. Never throws; returns what
  // did not end well, a line each: requests still stuck at the deadline (their handles stay open
  // until they end, and the process must not close the graph but exit), flushes that failed. Empty:
  // all is well. Idempotent.
  std::vector<std::string> stop(std::chrono::milliseconds deadline);

  // `callback` runs on a fiber, once, when somebody else unmounts the file system (`fusermount3
  // -u`) or aborts its connection. stop() is still to be called. Set it before start().
  void on_unmounted(std::function<void()> callback);

  // The live state, a line each: the mount, then each file. Any thread.
  std::vector<std::string> describe() const;
  const std::string& mountpoint() const noexcept;

 private:
  class State;
  std::shared_ptr<State> state_;
};

}  // namespace minivmm::fuse
