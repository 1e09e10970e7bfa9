// SPDX-License-Identifier: Apache-2.0
#include "virtio/rng_device.h"

#include <linux/virtio_ids.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "base/cancel.h"
#include "base/error.h"
#include "base/io.h"
#include "base/log.h"
#include "virtio/queue.h"

namespace minivmm::virtio {
namespace {

constexpr uint32_t kMaxSegments = 64;
constexpr unsigned kServedBetweenYields = 16;

// Bytes that were filled; 0 only before the host's generator is seeded.
uint32_t fill_random(std::span<const iovec> segments) noexcept {
  uint32_t filled = 0;
  for (const iovec& segment : segments) {
    const size_t want = std::min<size_t>(segment.iov_len, RngDevice::kMaxRequestBytes - filled);
    if (want == 0) break;
    const ssize_t got = ::getrandom(segment.iov_base, want, GRND_NONBLOCK);
    if (got > 0) filled += static_cast<uint32_t>(got);
    if (got != static_cast<ssize_t>(want)) break;
  }
  return filled;
}

}  // namespace

// The queue from DRIVER_OK to reset. All of it runs on the loop.
class RngDevice::Worker {
 public:
  Worker(RngDevice& device, const Queue& queue) : device_(device), queue_(queue) {}

  void run() noexcept {
    while (!stopping_) {
      serve();
      if (stopping_ || (!broken_ && !queue_.enable_notifications())) continue;
      const int64_t result = base::io::read_eventfd(device_.notify_fd_.get(), &cancel_);
      if (result < 0 && !stopping_) {
        base::log_error("{}: cannot wait for notifications: {}", device_.name_, -result);
        fail();
        break;
      }
    }
    const std::lock_guard lock(device_.mutex_);
    device_.worker_ended_ = true;
    device_.changed_.notify_all();
  }

  void request_stop() noexcept {
    stopping_ = true;
    cancel_.cancel();
  }

  uint64_t requests() const noexcept { return requests_.load(std::memory_order_relaxed); }
  uint64_t bytes() const noexcept { return bytes_.load(std::memory_order_relaxed); }

 private:
  void serve() noexcept {
    queue_.disable_notifications();
    std::array<iovec, kMaxSegments> segments;
    unsigned served = 0;
    while (!stopping_ && !broken_) {
      Chain chain;
      const Queue::Pop popped = queue_.pop(segments, chain);
      if (popped == Queue::Pop::kBroken) return fail();
      if (popped == Queue::Pop::kEmpty) break;
      const uint32_t filled =
          fill_random(std::span(segments).subspan(chain.readable, chain.writable));
      queue_.push_used(chain.head, filled);
      requests_.fetch_add(1, std::memory_order_relaxed);
      bytes_.fetch_add(filled, std::memory_order_relaxed);
      // A guest that never pauses must not keep the loop's other work waiting.
      if (++served % kServedBetweenYields == 0) {
        publish();
        device_.loop_.yield();
      }
    }
    publish();
  }

  void publish() noexcept {
    if (queue_.unpublished() && queue_.publish()) device_.signals_.used_buffers();
  }

  void fail() noexcept {
    publish();
    broken_ = true;
    if (queue_.fault() != QueueFault::kNone) {
      uint64_t suppressed = 0;
      if (device_.complaints_.allow(&suppressed)) {
        base::log_warning("{}: the guest broke its queue: {}; it must reset the device",
                          device_.name_, fault_text(queue_.fault()));
      }
    }
    device_.signals_.needs_reset();
  }

  RngDevice& device_;
  Queue queue_;
  base::CancelSource cancel_;
  bool stopping_ = false;
  bool broken_ = false;
  std::atomic<uint64_t> requests_{0};
  std::atomic<uint64_t> bytes_{0};
};

RngDevice::RngDevice(const GuestMemory& memory, base::EventLoop& loop, std::string name, int irqfd)
    : memory_(memory),
      loop_(loop),
      name_(std::move(name)),
      signals_(irqfd),
      notify_fd_(::eventfd(0, EFD_CLOEXEC)) {
  if (!notify_fd_) throw base::errno_error(errno, name_ + ": eventfd");
}

RngDevice::~RngDevice() { stop(); }

uint32_t RngDevice::device_id() const noexcept { return VIRTIO_ID_RNG; }

uint64_t RngDevice::features() const noexcept {
  return uint64_t{1} << VIRTIO_F_VERSION_1 | uint64_t{1} << VIRTIO_F_INDIRECT_DESC |
         uint64_t{1} << VIRTIO_F_EVENT_IDX;
}

void RngDevice::activate(std::span<const QueueSetup> queues) {
  if (queues.empty() || !queues.front().ready) return;
  const QueueLayout& layout = queues.front().layout;
  if (layout.size > max_queue_size()) {
    throw base::Error(
        EINVAL, fmt::format("size {} is more than the {} offered", layout.size, max_queue_size()));
  }
  const auto negotiated = [this](unsigned feature) { return (features_ >> feature & 1) != 0; };
  const Queue queue(memory_, layout,
                    {.indirect = negotiated(VIRTIO_F_INDIRECT_DESC),
                     .event_index = negotiated(VIRTIO_F_EVENT_IDX)},
                    kMaxSegments);
  const std::lock_guard lock(mutex_);
  if (stopped_) throw base::Error(ESHUTDOWN, "the device is being stopped");
  worker_ = std::make_shared<Worker>(*this, queue);
  worker_ended_ = false;
  loop_.post("virtio rng", [worker = worker_] { worker->run(); });
}

void RngDevice::notify(uint16_t) noexcept {
  const uint64_t one = 1;
  (void)!::write(notify_fd_.get(), &one, sizeof one);
}

void RngDevice::end_worker(std::unique_lock<std::mutex>& lock) {
  if (!worker_) return;
  loop_.post("virtio rng stop", [worker = worker_] { worker->request_stop(); });
  changed_.wait(lock, [this] { return worker_ended_ || !worker_; });
  worker_.reset();
  changed_.notify_all();
}

bool RngDevice::stop_queue(uint16_t) { return reset(); }

bool RngDevice::reset() {
  std::unique_lock lock(mutex_);
  end_worker(lock);
  return true;
}

void RngDevice::stop() {
  std::unique_lock lock(mutex_);
  stopped_ = true;
  end_worker(lock);
}

std::string RngDevice::describe() const {
  const std::lock_guard lock(mutex_);
  return fmt::format("{}: virtio rng on {}, {} requests, {} bytes{}", name_, loop_.name(),
                     worker_ ? worker_->requests() : 0, worker_ ? worker_->bytes() : 0,
                     stopped_ ? ", stopped" : "");
}

}  // namespace minivmm::virtio
