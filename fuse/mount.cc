// SPDX-License-Identifier: Apache-2.0
#include "fuse/mount.h"

#include <cerrno>

#include <fmt/core.h>

#include "base/error.h"
#include "fuse/mount_state.h"

namespace minivmm::fuse {

Mount::Mount(base::LoopGroup& loops, std::string mountpoint, MountOptions options)
    : state_(std::make_shared<State>(loops, std::move(mountpoint), options)) {}

Mount::~Mount() {
  if (!state_->started()) return;
  // Any loop will do: a fiber is needed to wait on.
  state_->any_loop().call("FUSE unmount", [this] { (void)stop(std::chrono::milliseconds(0)); });
}

void Mount::add_file(const std::string& name, block::Handle handle, FileOptions options) {
  if (options.writable && !handle.writable()) {
    throw base::Error(EROFS, fmt::format("FUSE file '{}' cannot be writable: {} is attached "
                                         "read-only",
                                         name, handle.describe()));
  }
  state_->files().add(name, std::move(handle), options.writable);
}

void Mount::remove_file(const std::string& name, std::chrono::milliseconds deadline,
                        bool only_unused) {
  state_->remove_file(name, base::Clock::now() + deadline, only_unused);
}
void Mount::start() { state_->start(); }

std::vector<std::string> Mount::stop(std::chrono::milliseconds deadline) {
  return state_->stop(base::Clock::now() + deadline);
}

void Mount::on_unmounted(std::function<void()> callback) {
  state_->set_on_unmounted(std::move(callback));
}

std::vector<std::string> Mount::describe() const { return state_->describe(); }
const std::string& Mount::mountpoint() const noexcept { return state_->mountpoint(); }

}  // namespace minivmm::fuse
