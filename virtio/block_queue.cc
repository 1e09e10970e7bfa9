// SPDX-License-Identifier: Apache-2.0
#include "virtio/block_queue.h"

#include <linux/virtio_blk.h>
#include <sched.h>

#include <algorithm>
#include <exception>
#include <thread>

#include <fmt/core.h>

#include "base/fiber.h"
#include "base/io.h"
#include "base/log.h"
#include "virtio/block_request.h"

namespace minivmm::virtio {

// A request in flight. The atomics are for describe_in_flight; the rest is the loop's.
struct BlockQueue::Slot {
  Slot* next_free = nullptr;
  iovec* segments = nullptr;  // slot_segments_ of them, this slot's own

  uint16_t head = 0;
  BlockRequest request;
  // In the first slot of a group: the requests joined to it, and all their buffers in order, which
  // begin as its own.
  Slot* group_next = nullptr;
  Slot* group_last = nullptr;
  uint32_t group_segments = 0;
  uint64_t group_bytes = 0;

  std::atomic<bool> busy{false};
  std::atomic<uint32_t> type{0};
  std::atomic<uint64_t> sector{0};
  std::atomic<uint64_t> bytes{0};
  std::atomic<base::Clock::rep> since{0};
};

namespace {

// Joined requests stay small enough that several groups of a batch run side by side.
constexpr uint64_t kMaxGroupBytes = 1 << 20;
constexpr uint32_t kMinSlotSegments = 64;
constexpr unsigned kLookBack = 8;
constexpr unsigned kTakenBetweenYields = 64;

bool can_join(uint32_t type) noexcept {
  return type == VIRTIO_BLK_T_IN || type == VIRTIO_BLK_T_OUT;
}

std::chrono::nanoseconds poll_limit(const BlockOptions& options) {
  // With a single processor, looking would only keep the guest from running.
  return std::thread::hardware_concurrency() > 1 ? options.poll_limit
                                                 : std::chrono::microseconds(0);
}

}  // namespace

BlockQueue::BlockQueue(const Parts& parts, Queue queue, std::function<void(BlockQueue&)> ended)
    : parts_(parts),
      queue_(queue),
      ended_(std::move(ended)),
      poller_(poll_limit(parts.options)),
      slot_segments_(std::max<uint32_t>(parts.options.queue_size, kMinSlotSegments)) {
  const size_t count = queue_.size();
  segments_ = std::make_unique_for_overwrite<iovec[]>(count * slot_segments_);
  slots_ = std::make_unique<Slot[]>(count);
  for (size_t i = count; i-- > 0;) {
    slots_[i].segments = &segments_[i * slot_segments_];
    slots_[i].next_free = free_;
    free_ = &slots_[i];
  }
}

BlockQueue::~BlockQueue() = default;

BlockQueue::Slot* BlockQueue::take_slot() noexcept {
  Slot* const slot = free_;
  if (slot != nullptr) free_ = slot->next_free;
  return slot;
}

void BlockQueue::give_back(Slot& slot) noexcept {
  // The last one used is the next one taken: its memory is warm.
  slot.next_free = free_;
  free_ = &slot;
}

// --- The worker ---

void BlockQueue::run() noexcept {
  worker_ = base::Fiber::current();
  watcher_runs_ = true;
  parts_.loop.spawn("virtio notifications", [this] { watch_notifications(); });
  unsigned taken = 0;
  for (;;) {
    const unsigned batch = take_batch();
    const bool published = publish();
    progressed_ = progressed_ || published || batch != 0;
    if (batch != 0) {
      taken += batch;
      // A guest that never pauses must not keep the loop's other work waiting.
      if (taken >= kTakenBetweenYields) {
        taken = 0;
        parts_.loop.yield();
      }
      continue;
    }
    taken = 0;
    if (!stopping_) {
      wait_for_work();
    } else if (in_flight_.load(std::memory_order_relaxed) != 0 || watcher_runs_) {
      sleep();
    } else {
      break;
    }
  }
  // A copy: whoever is told may destroy this object, and the callback in it, at once.
  const auto ended = ended_;
  ended(*this);
}

// Returns when there may be something to do.
void BlockQueue::wait_for_work() noexcept {
  if (free_ == nullptr || queue_.fault() != QueueFault::kNone) {
    sleep();  // until a request completes, or for good
    return;
  }
  if (progressed_) {
    // What we have just completed may be what the guest waited for before it goes on.
    progressed_ = false;
    idle_since_ = base::Clock::now();
    if (poller_.window().count() != 0 && look_for_work()) return;
  }
  if (!armed_) {
    if (!queue_.enable_notifications()) return;
    armed_ = true;
  }
  const uint64_t notified_before = notified_.get();
  sleep();
  if (notified_.get() != notified_before) poller_.slept(base::Clock::now() - idle_since_);
}

// Watches the ring for a while; true if there is something to do.
bool BlockQueue::look_for_work() noexcept {
  disarm();  // while we look, the guest need not spend an exit on telling us
  const base::Clock::time_point until = idle_since_ + poller_.window();
  for (base::Clock::time_point now = idle_since_; now < until;) {
    // Through the loop, so that completions and the loop's other users go on; and past whoever
    // waits for this processor, which may be the guest.
    parts_.loop.yield();
    ::sched_yield();
    const base::Clock::time_point after = base::Clock::now();
    poller_.looked(after - now);
    now = after;
    if (stopping_ || queue_.unpublished()) return true;
    if (queue_.has_available()) {
      poller_.found();
      polled_.add(1);
      return true;
    }
  }
  return false;
}

void BlockQueue::disarm() noexcept {
  if (!armed_) return;
  armed_ = false;
  queue_.disable_notifications();
}

void BlockQueue::sleep() noexcept {
  worker_asleep_ = true;
  worker_->waiting_for = "requests";
  worker_->suspend();
}

void BlockQueue::wake_worker() noexcept {
  if (!worker_asleep_) return;
  worker_asleep_ = false;
  parts_.loop.wake(*worker_);
}

void BlockQueue::watch_notifications() noexcept {
  for (;;) {
    const int64_t result = base::io::read_eventfd(parts_.notify_fd, &stop_watching_);
    if (stopping_) break;
    if (result < 0) {
      base::log_error("{}: queue {}: cannot wait for notifications: {}", parts_.options.name,
                      parts_.index, -result);
      queue_.break_with(QueueFault::kIndexJump);
      break;
    }
    notified_.add(1);
    wake_worker();
  }
  watcher_runs_ = false;
  wake_worker();
}

void BlockQueue::request_stop() noexcept {
  stopping_ = true;
  stop_watching_.cancel();
  wake_worker();
}

// --- Taking requests ---

unsigned BlockQueue::take_batch() noexcept {
  if (stopping_ || reported_ || !queue_.has_available()) return 0;
  batch_time_ = base::Clock::now();
  disarm();
  unsigned taken = 0;
  group_count_ = 0;
  while (taken < kBatch) {
    Slot* const slot = take_slot();
    if (slot == nullptr) break;
    Chain chain;
    const Queue::Pop popped = queue_.pop({slot->segments, slot_segments_}, chain);
    if (popped != Queue::Pop::kChain || !accept(*slot, chain)) {
      give_back(*slot);
      break;
    }
    ++taken;
  }
  ring_position_.store(queue_.next_available(), std::memory_order_relaxed);
  for (unsigned i = 0; i < group_count_; ++i) start(*groups_[i]);
  if (queue_.fault() != QueueFault::kNone) report_broken();
  return taken;
}

bool BlockQueue::accept(Slot& slot, const Chain& chain) noexcept {
  slot.head = chain.head;
  slot.group_next = nullptr;
  slot.group_last = &slot;
  const ParseResult parsed = parse_request({slot.segments, slot_segments_}, chain, slot.request);
  if (parsed == ParseResult::kNoStatus) {
    queue_.break_with(QueueFault::kNoStatusByte);
    return false;
  }
  requests_.add(1);
  in_flight_.store(in_flight_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  uint8_t status = VIRTIO_BLK_S_IOERR;
  if (parsed == ParseResult::kOk) status = check_request(slot.request, parts_.engine.rules());
  if (status != VIRTIO_BLK_S_OK) {
    slot.request.data_bytes = 0;
    finish(slot, status);
    return true;
  }
  slot.type.store(slot.request.type, std::memory_order_relaxed);
  slot.sector.store(slot.request.sector, std::memory_order_relaxed);
  slot.bytes.store(slot.request.data_bytes, std::memory_order_relaxed);
  slot.since.store(batch_time_.time_since_epoch().count(), std::memory_order_relaxed);
  slot.busy.store(true, std::memory_order_relaxed);
  if (join(slot)) return true;
  slot.group_segments = static_cast<uint32_t>(slot.request.data.size());
  slot.group_bytes = slot.request.data_bytes;
  groups_[group_count_++] = &slot;
  return true;
}

// Adds the request to a group of this batch that ends where it begins.
bool BlockQueue::join(Slot& slot) noexcept {
  const BlockRequest& r = slot.request;
  if (!can_join(r.type) || r.data_bytes == 0) return false;
  for (unsigned back = 1; back <= std::min(group_count_, kLookBack); ++back) {
    Slot& first = *groups_[group_count_ - back];
    const BlockRequest& f = first.request;
    if (f.type != r.type || f.offset() + first.group_bytes != r.offset()) continue;
    // The gathered list grows in the first slot's own segments, behind its header and data.
    iovec* const list = f.data.data();
    const auto used = static_cast<uint32_t>(list - first.segments) + first.group_segments;
    if (f.data_bytes == 0 || used + r.data.size() > slot_segments_ ||
        first.group_bytes + r.data_bytes > kMaxGroupBytes) {
      return false;
    }
    std::copy(r.data.begin(), r.data.end(), list + first.group_segments);
    first.group_segments += static_cast<uint32_t>(r.data.size());
    first.group_bytes += r.data_bytes;
    first.group_last->group_next = &slot;
    first.group_last = &slot;
    merged_.add(1);
    return true;
  }
  return false;
}

void BlockQueue::start(Slot& first) noexcept {
  try {
    parts_.loop.spawn_now("virtio request", [this, slot = &first] { run_group(*slot); });
  } catch (const std::exception& e) {
    base::log_error("{}: no fiber for a request: {}", parts_.options.name, e.what());
    for (Slot* slot = &first; slot != nullptr;) {
      Slot* const next = slot->group_next;
      finish(*slot, VIRTIO_BLK_S_IOERR);
      slot = next;
    }
  }
}

// --- Running and answering them ---

void BlockQueue::run_group(Slot& first) noexcept {
  const BlockRequest& r = first.request;
  const bool single = first.group_next == nullptr;
  const bool all_done =
      !single && parts_.engine.try_transfer(
                     r.type, r.offset(), {r.data.data(), first.group_segments, first.group_bytes});
  for (Slot* slot = &first; slot != nullptr;) {
    Slot* const next = slot->group_next;  // finish() gives the slot back
    const uint8_t status = all_done ? uint8_t{VIRTIO_BLK_S_OK} : parts_.engine.run(slot->request);
    finish(*slot, status);
    slot = next;
  }
}

void BlockQueue::finish(Slot& slot, uint8_t status) noexcept {
  const BlockRequest& r = slot.request;
  uint64_t written = 1;
  if (status == VIRTIO_BLK_S_OK) {
    if (r.type == VIRTIO_BLK_T_IN) written += r.data_bytes;
    if (r.type == VIRTIO_BLK_T_GET_ID) {
      written += std::min<uint64_t>(r.data_bytes, VIRTIO_BLK_ID_BYTES);
    }
  } else {
    failed_.add(1);
  }
  // SAFETY: one byte inside guest memory, found by parse_request. Visible before the used index.
  *reinterpret_cast<volatile uint8_t*>(r.status) = status;
  queue_.push_used(slot.head, static_cast<uint32_t>(std::min<uint64_t>(written, UINT32_MAX)));
  slot.busy.store(false, std::memory_order_relaxed);
  in_flight_.store(in_flight_.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
  give_back(slot);
  // Asleep: runs after all that completes in this turn of the loop. Awake: publishes anyway.
  wake_worker();
}

bool BlockQueue::publish() noexcept {
  if (!queue_.unpublished()) return false;
  if (queue_.publish()) {
    interrupts_.add(1);
    parts_.signals.used_buffers();
  }
  return true;
}

void BlockQueue::report_broken() noexcept {
  if (reported_) return;
  reported_ = true;
  broken_.store(true, std::memory_order_relaxed);
  // A guest may break it, reset, and break it again.
  uint64_t suppressed = 0;
  if (parts_.engine.complaints().allow(&suppressed)) {
    base::log_warning("{}: queue {}: the guest broke it: {}; it must reset the device",
                      parts_.options.name, parts_.index, fault_text(queue_.fault()));
  }
  parts_.signals.needs_reset();
}

// --- State dumps ---

std::string BlockQueue::describe() const {
  return fmt::format(
      "{}: queue {} on {}: size {}, next {}, {} in flight, {} requests, {} merged, {} failed, "
      "{} notifications, {} polled, {} interrupts{}",
      parts_.options.name, parts_.index, parts_.loop.name(), queue_.size(),
      ring_position_.load(std::memory_order_relaxed), in_flight_.load(std::memory_order_relaxed),
      requests_.get(), merged_.get(), failed_.get(), notified_.get(), polled_.get(),
      interrupts_.get(), broken_.load(std::memory_order_relaxed) ? ", broken by the guest" : "");
}

void BlockQueue::describe_in_flight(std::vector<std::string>& lines, size_t limit) const {
  const auto now = base::Clock::now().time_since_epoch();
  for (uint16_t i = 0; i < queue_.size() && lines.size() < limit; ++i) {
    const Slot& slot = slots_[i];
    if (!slot.busy.load(std::memory_order_relaxed)) continue;
    const auto age = now - base::Clock::duration(slot.since.load(std::memory_order_relaxed));
    lines.push_back(fmt::format(
        "{}: queue {}: {} of {} bytes at sector {}, for {:.3f} s", parts_.options.name,
        parts_.index, request_name(slot.type.load(std::memory_order_relaxed)),
        slot.bytes.load(std::memory_order_relaxed), slot.sector.load(std::memory_order_relaxed),
        std::chrono::duration<double>(age).count()));
  }
}

}  // namespace minivmm::virtio
