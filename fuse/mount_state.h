// SPDX-License-Identifier: Apache-2.0
// What a Mount is made of. Shared with the fibers that serve it, so that a mount whose requests
// hang can be left behind: the last of them frees it.
#pragma once

#include <string>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "base/sync.h"
#include "fuse/channel.h"
#include "fuse/file_table.h"
#include "fuse/mount.h"
#include "fuse/mountpoint.h"
#include "fuse/session.h"

namespace minivmm::fuse {

class Mount::State : public std::enable_shared_from_this<Mount::State> {
 public:
  State(base::LoopGroup& loops, std::string mountpoint, const MountOptions& options);

  FileTable& files() noexcept { return files_; }
  const std::string& mountpoint() const noexcept { return given_path_; }
  base::EventLoop& any_loop() noexcept { return loops_.next(); }
  // Between start() and stop().
  bool started() const noexcept { return phase_ == Phase::kMounted || phase_ == Phase::kLost; }
  void set_on_unmounted(std::function<void()> callback) { on_unmounted_ = std::move(callback); }

  // As Mount's.
  void start();
  void remove_file(const std::string& name, base::Clock::time_point deadline, bool only_unused);
  std::vector<std::string> stop(base::Clock::time_point deadline);
  std::vector<std::string> describe() const;

 private:
  enum class Phase { kNew, kMounted, kLost, kStopped };

  void mount();
  void undo_mount() noexcept;
  void serve(Channel& channel);
  void lost();
  bool still_mounted() const;
  void unmount_blocking();
  bool within(base::Clock::time_point deadline, const char* name, std::function<void()> work);
  void stop_channels(base::Clock::time_point deadline, std::vector<std::string>& troubles);
  void abandon_channels(std::vector<std::string>& troubles);
  void close_files(base::Clock::time_point deadline, std::vector<std::string>& troubles);

  base::LoopGroup& loops_;
  const std::string given_path_;
  const MountOptions options_;
  std::function<void()> on_unmounted_;
  FileTable files_;
  Mountpoint mountpoint_;
  std::unique_ptr<Session> session_;
  mutable std::mutex channels_mutex_;  // guards the vector, which start() fills
  std::vector<std::unique_ptr<Channel>> channels_;
  std::atomic<Phase> phase_{Phase::kNew};
  std::atomic<size_t> serving_{0};  // channels that read or have requests in flight
  base::Event all_idle_;
};

}  // namespace minivmm::fuse
