// SPDX-License-Identifier: Apache-2.0
#include "block/jobs/worker_group.h"

#include <exception>

namespace minivmm::block {

void WorkerGroup::failed(uint64_t offset) noexcept {
  stop();
  const std::exception_ptr error = std::current_exception();
  const std::lock_guard lock(mutex_);
  if (error_ && offset >= error_at_) return;
  error_.emplace(base::errno_of(error), base::text_of(error));
  error_at_ = offset;
}

void WorkerGroup::run(base::LoopGroup& loops, unsigned count, const std::function<void()>& work) {
  unsigned started = 0;
  try {
    for (; started < count; ++started) {
      running_.add();
      loops.loop(started % loops.size()).post("job", [this, &work] {
        try {
          work();
        } catch (...) {
          failed(~uint64_t{0});
        }
        running_.done();
      });
    }
  } catch (...) {  // no memory for one more
    running_.done();
    failed(~uint64_t{0});
  }
  running_.wait();
  const std::lock_guard lock(mutex_);
  if (error_) throw base::Error(*error_);
}

}  // namespace minivmm::block
