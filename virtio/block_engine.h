// SPDX-License-Identifier: Apache-2.0
// Carries out block requests on a disk of the graph, in the driver's cache mode. Shared by the
// queues of one device; run() and transfer() on fibers of any loop, many at once.
#pragma once

#include <string>
#include <string_view>

#include <atomic>
#include <cstdint>
#include <mutex>

#include "base/log.h"
#include "base/wait_queue.h"
#include "block/graph/handle.h"
#include "virtio/block_limits.h"
#include "virtio/block_options.h"
#include "virtio/block_request.h"

namespace minivmm::virtio {

class BlockEngine {
 public:
  // `options` outlive the engine.
  BlockEngine(block::Handle disk, const BlockOptions& options);
  BlockEngine(const BlockEngine&) = delete;
  BlockEngine& operator=(const BlockEngine&) = delete;

  const BlockShape& shape() const noexcept { return shape_; }
  block::Handle& disk() noexcept { return disk_; }

  // Carries out a checked request of any type. Returns its status (VIRTIO_BLK_S_*).
  uint8_t run(const BlockRequest& request) noexcept;
  // A checked read or write of several requests at once. On failure each is to be tried alone, and
  // nothing is logged.
  bool try_transfer(uint32_t type, uint64_t offset, base::IoSpan io) noexcept;

  BlockRules rules() const noexcept;

  // The driver's choices. Any thread.
  void set_features(uint64_t features) noexcept;
  void forget_driver() noexcept;
  bool negotiated(unsigned feature) const noexcept {
    return (features_.load(std::memory_order_relaxed) >> feature & 1) != 0;
  }
  // In write-through mode a write is durable when it completes; the first one also makes durable
  // what was written before.
  void set_write_back(bool on) noexcept;
  bool write_back() const noexcept { return write_back_.load(std::memory_order_acquire); }

  // Requests that wait after an error (ErrorAction::kStop) are tried again. Any thread.
  void resume() noexcept;
  // They fail, and none waits any more. Any thread.
  void wait_no_more() noexcept;

  uint64_t capacity_sectors() const noexcept { return capacity_.load(std::memory_order_acquire); }
  // Looks at the disk's size again; true if the capacity changed.
  bool update_capacity() noexcept;

  // For messages that the guest can cause.
  base::RateLimit& complaints() noexcept { return complaints_; }
  uint64_t errors() const noexcept { return errors_.load(std::memory_order_relaxed); }

 private:
  enum class Verdict : uint8_t { kFail, kSucceed, kAgain };
  uint8_t attempt(const BlockRequest& request, int& error, std::string& why) noexcept;
  Verdict judge(const BlockRequest& request, int error, const std::string& why) noexcept;
  bool wait_for_resume(const BlockRequest& request, const std::string& why);
  void perform(const BlockRequest& request);
  void transfer(uint32_t type, uint64_t offset, base::IoSpan io);
  void settle_write_through();
  void write_id(const BlockRequest& request) const noexcept;
  uint8_t run_ranges(const BlockRequest& request);
  void report(const BlockRequest& request, std::string_view why) noexcept;

  const BlockOptions& options_;
  block::Handle disk_;
  const BlockShape shape_;
  std::atomic<uint64_t> features_{0};
  std::atomic<uint64_t> capacity_{0};
  std::atomic<bool> write_back_{false};
  // How often write-back was turned off, and up to which time what was written then is durable.
  std::atomic<uint64_t> times_off_{0};
  std::atomic<uint64_t> times_settled_{0};
  std::atomic<uint64_t> errors_{0};
  std::mutex waiting_mutex_;  // guards the three below
  base::WaitQueue waiting_;
  uint64_t times_resumed_ = 0;
  bool wait_no_more_ = false;
  base::RateLimit complaints_;
};

}  // namespace minivmm::virtio
