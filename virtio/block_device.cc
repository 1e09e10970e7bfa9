// SPDX-License-Identifier: Apache-2.0
#include "virtio/block_device.h"

#include <linux/virtio_blk.h>
#include <linux/virtio_ids.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>

#include <fmt/core.h>

#include "base/error.h"
#include "base/fiber.h"
#include "base/log.h"

namespace minivmm::virtio {
namespace {

constexpr auto kForever = base::Clock::time_point::max();
constexpr size_t kDescribedRequests = 32;

BlockOptions checked(BlockOptions options) {
  check_options(options);
  return options;
}

}  // namespace

BlockDevice::BlockDevice(block::Handle disk, const GuestMemory& memory, BlockOptions options,
                         std::vector<base::EventLoop*> loops, int irqfd)
    : options_(checked(std::move(options))),
      memory_(memory),
      loops_(std::move(loops)),
      signals_(irqfd),
      engine_(std::move(disk), options_) {
  if (loops_.empty()) throw base::Error(EINVAL, options_.name + ": no loop to run its queues on");
  for (uint16_t i = 0; i < options_.num_queues; ++i) {
    // Blocking: the ring then waits for it by itself; it is only read through the loop.
    notify_fds_.emplace_back(::eventfd(0, EFD_CLOEXEC));
    if (!notify_fds_.back()) throw base::errno_error(errno, options_.name + ": eventfd");
  }
}

BlockDevice::~BlockDevice() = default;

uint32_t BlockDevice::device_id() const noexcept { return VIRTIO_ID_BLOCK; }

// --- Configuration ---

void BlockDevice::read_config(uint64_t offset, std::span<std::byte> data) {
  const std::lock_guard lock(config_mutex_);
  engine_.shape().read_config(
      {.capacity_sectors = engine_.capacity_sectors(), .write_back = engine_.write_back()}, offset,
      data);
}

void BlockDevice::write_config(uint64_t offset, std::span<const std::byte> data) {
  constexpr uint64_t kField = BlockShape::kWriteBackOffset;
  if (offset > kField || kField - offset >= data.size()) return;
  // Without FLUSH the driver could not make anything durable itself.
  if (!engine_.negotiated(VIRTIO_BLK_F_CONFIG_WCE) || !engine_.negotiated(VIRTIO_BLK_F_FLUSH)) {
    return;
  }
  const std::lock_guard lock(config_mutex_);
  engine_.set_write_back((data[static_cast<size_t>(kField - offset)] & std::byte{1}) !=
                         std::byte{0});
}

void BlockDevice::resize() {
  bool changed = false;
  {
    const Lock alive(mutex_);
    if (stopping_) return;  // the handle may be gone
    const std::lock_guard lock(config_mutex_);
    changed = engine_.update_capacity();
    if (changed) signals_.next_generation();
  }
  if (changed) signals_.config_changed();
}

void BlockDevice::accept_features(uint64_t features) { engine_.set_features(features); }

// --- Queues ---

std::unique_ptr<BlockQueue> BlockDevice::make_queue(uint16_t index, const QueueLayout& layout) {
  if (layout.size > options_.queue_size) {
    throw base::Error(EINVAL, fmt::format("queue {}: size {} is more than the {} offered", index,
                                          layout.size, options_.queue_size));
  }
  try {
    const QueueFeatures features{.indirect = engine_.negotiated(VIRTIO_F_INDIRECT_DESC),
                                 .event_index = engine_.negotiated(VIRTIO_F_EVENT_IDX)};
    return std::make_unique<BlockQueue>(
        BlockQueue::Parts{engine_, signals_, *loops_[index % loops_.size()], options_, index,
                          notify_fds_[index].get()},
        Queue(memory_, layout, features, options_.queue_size),
        [this](BlockQueue& queue) { queue_ended(queue); });
  } catch (base::Error& e) {
    e.prepend(fmt::format("queue {}", index));
    throw;
  }
}

void BlockDevice::activate(std::span<const QueueSetup> queues) {
  // All are checked before the first runs.
  std::vector<std::unique_ptr<BlockQueue>> made;
  for (size_t i = 0; i < queues.size(); ++i) {
    if (!queues[i].ready) continue;
    made.push_back(make_queue(static_cast<uint16_t>(i), queues[i].layout));
  }
  const Lock lock(mutex_);
  if (stopping_) throw base::Error(ESHUTDOWN, "the device is being stopped");
  running_.reserve(made.size());
  for (std::unique_ptr<BlockQueue>& queue : made) {
    BlockQueue* const q = queue.get();
    q->loop().post("virtio queue", [q] { q->run(); });
    running_.push_back({std::move(queue)});
  }
}

void BlockDevice::notify(uint16_t queue) noexcept {
  const uint64_t one = 1;
  (void)!::write(notify_fds_[queue].get(), &one, sizeof one);
}

void BlockDevice::queue_ended(BlockQueue& queue) {
  {
    const Lock lock(mutex_);
    for (Running& r : running_) {
      if (r.queue.get() == &queue) r.ended = true;
    }
    thread_waiters_.notify_all();
    fiber_waiters_.notify_all();
    if (!abandoned_ || !all_ended()) return;
  }
  // stop() did not wait for this: an abandoned device lives on, and lets go of its disk here.
  const std::string error = close_handle();
  if (!error.empty()) base::log_error("{}: {}", options_.name, error);
}

std::string BlockDevice::close_handle() {
  try {
    engine_.disk().close();
    return {};
  } catch (const std::exception& e) {
    return e.what();
  }
}

void BlockDevice::post_stop(Running& running) {
  if (running.stop_posted || running.ended) return;
  BlockQueue* const q = running.queue.get();
  q->loop().post("virtio stop", [q] { q->request_stop(); });
  running.stop_posted = true;
}

bool BlockDevice::all_ended() const noexcept {
  return std::all_of(running_.begin(), running_.end(), [](const Running& r) { return r.ended; });
}

// True if `done`, false at the deadline. On a fiber or on a plain thread.
template <typename Done>
bool BlockDevice::wait(Lock& lock, base::Clock::time_point deadline, Done done) {
  const bool fiber = base::Fiber::current() != nullptr;
  while (!done()) {
    if (deadline != kForever && base::Clock::now() >= deadline) return false;
    if (fiber && deadline == kForever) {
      fiber_waiters_.wait(lock, "a virtio device to become idle");
    } else if (fiber) {
      (void)fiber_waiters_.wait_until(lock, deadline, "a virtio device to become idle");
    } else if (deadline == kForever) {
      thread_waiters_.wait(lock);
    } else {
      (void)thread_waiters_.wait_until(lock, deadline);
    }
  }
  return true;
}

bool BlockDevice::wait_until_ended(Lock& lock, base::Clock::time_point deadline) {
  (void)wait(lock, deadline, [this] { return all_ended() || abandoned_; });
  return all_ended();
}

bool BlockDevice::stop_queue(uint16_t queue) {
  Lock lock(mutex_);
  const auto found = [&] {
    return std::find_if(running_.begin(), running_.end(),
                        [&](const Running& r) { return r.queue->index() == queue; });
  };
  if (found() == running_.end()) return true;
  post_stop(*found());
  (void)wait(lock, kForever, [&] { return found()->ended || abandoned_; });
  return found()->ended;
}

bool BlockDevice::reset() {
  Lock lock(mutex_);
  for (Running& r : running_) post_stop(r);
  if (!wait_until_ended(lock, kForever)) return false;
  if (!stopping_) running_.clear();  // else stop() looks at them too
  engine_.forget_driver();
  return true;
}

// --- Ending ---

StopReport BlockDevice::stop(std::chrono::milliseconds timeout) {
  const auto deadline = base::Clock::now() + timeout;
  StopReport report;
  engine_.wait_no_more();
  Lock lock(mutex_);
  stopping_ = true;
  for (Running& r : running_) post_stop(r);
  if (wait_until_ended(lock, deadline)) {
    close_disk(lock, deadline, report);
  } else {
    for (const Running& r : running_) {
      if (!r.ended) r.queue->describe_in_flight(report.in_flight, kDescribedRequests);
    }
  }
  if (!report.idle) {
    abandoned_ = true;
    thread_waiters_.notify_all();
    fiber_waiters_.notify_all();
  }
  return report;
}

void BlockDevice::close_disk(Lock& lock, base::Clock::time_point deadline, StopReport& report) {
  // Shared: at the deadline the fiber is left alone with it.
  const auto closing = std::make_shared<Closing>();
  loops_.front()->post("virtio close", [this, closing] {
    std::string error = close_handle();
    const Lock inner(mutex_);
    closing->error = std::move(error);
    closing->done = true;
    thread_waiters_.notify_all();
    fiber_waiters_.notify_all();
  });
  report.idle = wait(lock, deadline, [&] { return closing->done; });
  if (report.idle) {
    report.error = closing->error;
  } else {
    report.in_flight.push_back(
        fmt::format("{}: the flush that ends its use of the disk", options_.name));
  }
}

std::vector<std::string> BlockDevice::describe() const {
  const Lock lock(mutex_);
  std::vector<std::string> lines;
  lines.push_back(fmt::format("{}: virtio block, {} sectors{}, {}, {} queues, {} errors{}",
                              options_.name, engine_.capacity_sectors(),
                              engine_.shape().writable() ? "" : " (read-only)",
                              engine_.write_back() ? "write-back" : "write-through",
                              options_.num_queues, engine_.errors(), stopping_ ? ", stopped" : ""));
  for (const Running& r : running_) {
    if (!r.ended) lines.push_back(r.queue->describe());
  }
  for (const Running& r : running_) {
    if (!r.ended) r.queue->describe_in_flight(lines, lines.size() + kDescribedRequests);
  }
  return lines;
}

}  // namespace minivmm::virtio
