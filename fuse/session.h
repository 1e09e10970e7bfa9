// SPDX-License-Identifier: Apache-2.0
// The libfuse side of a mount: mounts, shakes hands, and answers everything but READ and WRITE
// (those two the Channel takes itself, without libfuse's work for each request).
//
// libfuse is given each request by the loop that read it, on that loop's thread, and answers
// through it: the kernel wants an answer on the descriptor that the request came from. Its
// callbacks never suspend: what may wait runs as a fiber of its own and replies later, on the same
// loop.
#pragma once

#include <string>

#include <array>
#include <cstdint>
#include <memory>
#include <span>

#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "fuse/file_table.h"
#include "fuse/invalidator.h"

struct fuse_session;

namespace minivmm::fuse {

class Channel;

// What the files and the directory look like.
struct Appearance {
  uint32_t mode = 0600;
  uint32_t uid = 0;
  uint32_t gid = 0;
};

class Session {
 public:
  Session(FileTable& files, Appearance appearance) : files_(files), appearance_(appearance) {}
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  // No request may be under way.
  ~Session();

  // Blocks. The kernel sends requests from here on. Throws base::Error.
  void mount(const std::string& path, bool allow_other);
  // Blocks. Gives up the mount, also one in use, if it is still there.
  void abandon_mount() noexcept;

  // Another descriptor of the mount, with requests of its own. Throws base::Error.
  base::UniqueFd clone_device() const;

  // Before the first request, for each loop that will pass requests in.
  void set_channel(const base::EventLoop& loop, Channel& channel) noexcept {
    channels_[loop.index()] = &channel;
  }

  // On a loop's thread: has libfuse take a request, whose memory is free again on return.
  void process(std::span<std::byte> request);

  // For the callbacks, on a loop's thread.
  FileTable& files() noexcept { return files_; }
  const Appearance& appearance() const noexcept { return appearance_; }
  const std::shared_ptr<Invalidator>& invalidator() const noexcept { return invalidator_; }
  Channel& channel() noexcept { return *channels_[base::EventLoop::current()->index()]; }

 private:
  static ssize_t write_reply(int fd, struct iovec* iov, int count, void* self);
  void amend_reply(struct iovec* iov, int count);

  FileTable& files_;
  const Appearance appearance_;
  fuse_session* session_ = nullptr;
  std::shared_ptr<Invalidator> invalidator_;  // from mount() on
  std::array<Channel*, base::EventLoop::kMaxLoops> channels_{};
};

}  // namespace minivmm::fuse
