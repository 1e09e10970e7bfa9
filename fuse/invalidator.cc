// SPDX-License-Identifier: Apache-2.0
#include "fuse/invalidator.h"

#include <pthread.h>

#include <cerrno>
#include <exception>
#include <optional>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/log.h"
#include "fuse/page_dropper.h"

namespace minivmm::fuse {

// On the stack of the fiber that waits for it.
struct Invalidator::Job {
  uint64_t inode;
  uint64_t offset;
  uint64_t length;
  int error = 0;
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
  if (job.error != 0) {
    base::log_error("/dev/fuse: mapped pages may be stale: invalidating them: {}",
                    base::errno_text(job.error));
  }
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
  std::optional<PageDropper> dropper;
  try {
    dropper.emplace(std::move(shared->device));
  } catch (const std::exception& e) {
    base::log_error("FUSE: {}", e.what());
  }
  std::unique_lock lock(shared->mutex);
  for (;;) {
    shared->wanted.wait(lock, [&] { return shared->stopping || shared->jobs != nullptr; });
    Job* job = std::exchange(shared->jobs, nullptr);
    if (job == nullptr) break;
    lock.unlock();
    while (job != nullptr) {
      Job* const next = job->next;
      job->error = dropper ? dropper->drop(job->inode, job->offset, job->length) : EAGAIN;
      job->done.set();
      job = next;
    }
    lock.lock();
  }
  lock.unlock();
  dropper.reset();
  shared->ended.set();
}

}  // namespace minivmm::fuse
