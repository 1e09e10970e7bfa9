// SPDX-License-Identifier: Apache-2.0
#include "fuse/invalidator.h"

#include <linux/fuse.h>
#include <pthread.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/log.h"

namespace minivmm::fuse {

// On the stack of the fiber that waits for it.
struct Invalidator::Job {
  uint64_t inode;
  uint64_t offset;
  uint64_t length;
  base::Event done{};
  Job* next = nullptr;
};

struct Invalidator::Shared {
  std::mutex mutex;
  std::condition_variable wanted;
  base::UniqueFd device;  // the thread's, once it runs
  Job* jobs = nullptr;
  bool running = false;
  bool stopping = false;
  base::Event ended;
};

namespace {

// Returns when the kernel has dropped the pages. It knows no such inode: there are none.
void tell_kernel(int device, uint64_t inode, uint64_t offset, uint64_t length) noexcept {
  constexpr uint64_t kMost = std::numeric_limits<int64_t>::max();
  fuse_notify_inval_inode_out what{};
  what.ino = inode;
  what.off = static_cast<int64_t>(std::min(offset, kMost));
  what.len = static_cast<int64_t>(std::min(length, kMost - std::min(offset, kMost)));
  fuse_out_header header{};
  header.len = sizeof header + sizeof what;
  header.error = FUSE_NOTIFY_INVAL_INODE;
  const iovec iov[] = {{&header, sizeof header}, {&what, sizeof what}};
  if (::writev(device, iov, 2) >= 0) return;
  const int error = errno;
  if (error == ENOENT || error == ENODEV || error == ENOTCONN) return;
  base::log_error("/dev/fuse: mapped pages may be stale: invalidating them: {}",
                  base::errno_text(error));
}

}  // namespace

Invalidator::Invalidator(base::UniqueFd device) : shared_(std::make_shared<Shared>()) {
  shared_->device = std::move(device);
}

Invalidator::~Invalidator() {
  const std::lock_guard lock(shared_->mutex);
  shared_->stopping = true;
  shared_->wanted.notify_one();
}

void Invalidator::invalidate(uint64_t inode, uint64_t offset, uint64_t length) noexcept {
  Job job{.inode = inode, .offset = offset, .length = length};
  {
    const std::lock_guard lock(shared_->mutex);
    if (shared_->stopping) return;
    if (!shared_->running) {
      try {
        std::thread([shared = shared_] { run(shared); }).detach();
      } catch (const std::exception& e) {
        base::log_error("FUSE: mapped pages may be stale: {}", e.what());
        return;
      }
      shared_->running = true;
    }
    job.next = std::exchange(shared_->jobs, &job);
    shared_->wanted.notify_one();
  }
  job.done.wait();
}

bool Invalidator::stop(base::Clock::time_point deadline) {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->stopping = true;
    shared_->wanted.notify_one();
    if (!shared_->running) {
      shared_->device.reset();
      return true;
    }
  }
  return shared_->ended.wait_until(deadline);
}

void Invalidator::run(const std::shared_ptr<Shared>& shared) noexcept {
  ::pthread_setname_np(::pthread_self(), "fuse-invalidate");
  std::unique_lock lock(shared->mutex);
  for (;;) {
    shared->wanted.wait(lock, [&] { return shared->stopping || shared->jobs != nullptr; });
    Job* job = std::exchange(shared->jobs, nullptr);
    if (job == nullptr) break;
    lock.unlock();
    while (job != nullptr) {
      Job* const next = job->next;
      tell_kernel(shared->device.get(), job->inode, job->offset, job->length);
      job->done.set();
      job = next;
    }
    lock.lock();
  }
  shared->device.reset();
  lock.unlock();
  shared->ended.set();
}

}  // namespace minivmm::fuse
