// SPDX-License-Identifier: Apache-2.0
// The virtio block device: features, configuration space, and the life of its queues. Requests
// themselves are the queues' and the engine's.
//
// Starting and stopping are asked of the queues' loops and waited for; a wait blocks a plain
// thread or suspends a fiber, and stop() ends every wait, so that a disk that hangs cannot keep
// the process from ending.
#pragma once

#include <string>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "base/event_loop.h"
#include "base/unique_fd.h"
#include "base/wait_queue.h"
#include "block/graph/handle.h"
#include "virtio/block_engine.h"
#include "virtio/block_options.h"
#include "virtio/block_queue.h"
#include "virtio/device.h"
#include "virtio/guest_memory.h"
#include "virtio/mmio_block.h"
#include "virtio/signals.h"

namespace minivmm::virtio {

class BlockDevice final : public Device {
 public:
  // As MmioBlock's.
  BlockDevice(block::Handle disk, const GuestMemory& memory, BlockOptions options,
              std::vector<base::EventLoop*> loops, int irqfd);
  BlockDevice(const BlockDevice&) = delete;
  BlockDevice& operator=(const BlockDevice&) = delete;
  // stop() must have reported idle.
  ~BlockDevice() override;

  Signals& signals() noexcept { return signals_; }
  const BlockOptions& options() const noexcept { return options_; }
  int notify_fd(uint16_t queue) const noexcept { return notify_fds_[queue].get(); }

  uint32_t device_id() const noexcept override;
  uint64_t features() const noexcept override { return engine_.shape().features(); }
  uint16_t queue_count() const noexcept override { return options_.num_queues; }
  uint16_t max_queue_size() const noexcept override { return options_.queue_size; }
  void read_config(uint64_t offset, std::span<std::byte> data) override;
  void write_config(uint64_t offset, std::span<const std::byte> data) override;
  void accept_features(uint64_t features) override;
  void activate(std::span<const QueueSetup> queues) override;
  void notify(uint16_t queue) noexcept override;
  bool stop_queue(uint16_t queue) override;
  bool reset() override;

  void resize();
  void resume() noexcept { engine_.resume(); }
  StopReport stop(std::chrono::milliseconds timeout);
  std::vector<std::string> describe() const;

 private:
  using Lock = std::unique_lock<std::mutex>;
  // A queue that was started; gone once it has ended and somebody has seen that.
  struct Running {
    std::unique_ptr<BlockQueue> queue;
    bool stop_posted = false;
    bool ended = false;
  };
  // How the closing of the handle, on a fiber of its own, came out.
  struct Closing {
    bool done = false;
    std::string error;
  };

  std::unique_ptr<BlockQueue> make_queue(uint16_t index, const QueueLayout& layout);
  void queue_ended(BlockQueue& queue);
  void post_stop(Running& running);
  bool all_ended() const noexcept;
  template <typename Done>
  bool wait(Lock& lock, base::Clock::time_point deadline, Done done);
  bool wait_until_ended(Lock& lock, base::Clock::time_point deadline);
  std::string close_handle();  // what went wrong, or nothing
  void close_disk(Lock& lock, base::Clock::time_point deadline, StopReport& report);

  const BlockOptions options_;
  const GuestMemory& memory_;
  const std::vector<base::EventLoop*> loops_;
  Signals signals_;
  BlockEngine engine_;
  std::vector<base::UniqueFd> notify_fds_;

  std::mutex config_mutex_;  // makes a change and its generation one

  mutable std::mutex mutex_;  // guards all below
  std::condition_variable thread_waiters_;
  base::WaitQueue fiber_waiters_;
  std::vector<Running> running_;
  bool stopping_ = false;   // no queue starts any more
  bool abandoned_ = false;  // stop() has given up: nobody waits any more
};

}  // namespace minivmm::virtio
