// SPDX-License-Identifier: Apache-2.0
#include "virtio/mmio_transport.h"

#include <linux/virtio_mmio.h>

#include <algorithm>
#include <exception>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"

namespace minivmm::virtio {
namespace {

constexpr uint32_t kMagic = 0x74726976;    // "virt"
constexpr uint32_t kVendor = 0x564d4d4d;   // "MMMV"
constexpr uint32_t kNothing = 0xffffffff;  // half of a shared memory region that is not there
constexpr uint64_t kQueueReset = 0x0c0;    // with VIRTIO_F_RING_RESET, which is not offered
constexpr uint32_t kDriverBits = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
                                 VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK |
                                 VIRTIO_CONFIG_S_FAILED;

constexpr void set_low(uint64_t& value, uint32_t half) noexcept {
  value = (value & ~uint64_t{0xffffffff}) | half;
}
constexpr void set_high(uint64_t& value, uint32_t half) noexcept {
  value = (value & 0xffffffff) | uint64_t{half} << 32;
}

}  // namespace

MmioTransport::MmioTransport(Device& device, Signals& signals, std::string name, bool legacy)
    : device_(device),
      signals_(signals),
      name_(std::move(name)),
      legacy_(legacy),
      queues_(device.queue_count()),
      queue_pages_(device.queue_count()),
      queue_alignments_(device.queue_count()) {
  forget_driver();
}

void MmioTransport::forget_driver() {
  device_features_select_ = 0;
  driver_features_select_ = 0;
  driver_features_ = 0;
  unknown_features_ = false;
  queue_select_ = 0;
  for (Device::QueueSetup& queue : queues_) {
    queue = {};
    queue.layout.size = device_.max_queue_size();
  }
  std::fill(queue_pages_.begin(), queue_pages_.end(), 0);
  std::fill(queue_alignments_.begin(), queue_alignments_.end(), 0);
}

void MmioTransport::complain(const char* what, uint64_t value) {
  uint64_t suppressed = 0;
  if (complaints_.allow(&suppressed)) {
    base::log_warning("{}: the guest {} ({:#x}); ignored ({} more like this not shown)", name_,
                      what, value, suppressed);
  }
}

Device::QueueSetup* MmioTransport::selected_queue() {
  return queue_select_ < queues_.size() ? &queues_[queue_select_] : nullptr;
}

// --- Reads ---

void MmioTransport::read(uint64_t offset, std::span<std::byte> data) {
  std::fill(data.begin(), data.end(), std::byte{0});
  if (offset >= VIRTIO_MMIO_CONFIG) {
    if (data.size() <= 8) device_.read_config(offset - VIRTIO_MMIO_CONFIG, data);
    return;
  }
  if (data.size() != 4 || offset % 4 != 0) return;
  base::store_le<uint32_t>(data.data(), read_register(offset));
}

uint32_t MmioTransport::read_register(uint64_t offset) {
  switch (offset) {
    case VIRTIO_MMIO_MAGIC_VALUE:
      return kMagic;
    case VIRTIO_MMIO_VERSION:
      return legacy_ ? 1 : 2;
    case VIRTIO_MMIO_DEVICE_ID:
      return device_.device_id();
    case VIRTIO_MMIO_VENDOR_ID:
      return kVendor;
    case VIRTIO_MMIO_INTERRUPT_STATUS:
      return signals_.interrupt_status();
    case VIRTIO_MMIO_STATUS:
      return signals_.status() & (legacy_ ? ~uint32_t{VIRTIO_CONFIG_S_FEATURES_OK} : ~0U);
    case VIRTIO_MMIO_CONFIG_GENERATION:
      return signals_.generation();
    case VIRTIO_MMIO_SHM_LEN_LOW:
    case VIRTIO_MMIO_SHM_LEN_HIGH:
    case VIRTIO_MMIO_SHM_BASE_LOW:
    case VIRTIO_MMIO_SHM_BASE_HIGH:
      return kNothing;
    default:
      return read_selected(offset);
  }
}

uint32_t MmioTransport::read_selected(uint64_t offset) {
  const std::lock_guard lock(mutex_);
  const Device::QueueSetup* const queue = selected_queue();
  switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES:
      if (device_features_select_ > 1) return 0;
      return static_cast<uint32_t>(offered_features() >> (32 * device_features_select_));
    case VIRTIO_MMIO_QUEUE_NUM_MAX:
      return queue != nullptr ? device_.max_queue_size() : 0;
    case VIRTIO_MMIO_QUEUE_READY:
      return !legacy_ && queue != nullptr && queue->ready ? 1 : 0;
    default:
      // Else write-only, reserved, or kQueueReset.
      return legacy_ ? read_legacy(offset, queue) : 0;
  }
}

// --- Writes ---

void MmioTransport::write(uint64_t offset, std::span<const std::byte> data) {
  if (offset >= VIRTIO_MMIO_CONFIG) {
    // The device knows its fields only once the features are settled.
    if (data.size() <= 8 &&
        has(legacy_ ? VIRTIO_CONFIG_S_DRIVER_OK : VIRTIO_CONFIG_S_FEATURES_OK)) {
      device_.write_config(offset - VIRTIO_MMIO_CONFIG, data);
    }
    return;
  }
  if (data.size() != 4 || offset % 4 != 0) return;
  write_register(offset, base::load_le<uint32_t>(data.data()));
}

void MmioTransport::write_register(uint64_t offset, uint32_t value) {
  switch (offset) {
    case VIRTIO_MMIO_QUEUE_NOTIFY:
      if (value < queues_.size()) device_.notify(static_cast<uint16_t>(value));
      return;
    case VIRTIO_MMIO_INTERRUPT_ACK:
      signals_.acknowledge(value);
      return;
    case VIRTIO_MMIO_STATUS:
      write_status(value);
      return;
    default:
      write_selected(offset, value);
      return;
  }
}

bool MmioTransport::may_set_up_queues() const noexcept {
  constexpr uint32_t kMask = VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK |
                             VIRTIO_CONFIG_S_FAILED | VIRTIO_CONFIG_S_NEEDS_RESET;
  return !changing_ && (signals_.status() & kMask) == VIRTIO_CONFIG_S_FEATURES_OK;
}

void MmioTransport::write_selected(uint64_t offset, uint32_t value) {
  std::unique_lock lock(mutex_);
  switch (offset) {
    case VIRTIO_MMIO_DEVICE_FEATURES_SEL:
      device_features_select_ = value;
      return;
    case VIRTIO_MMIO_DRIVER_FEATURES_SEL:
      driver_features_select_ = value;
      return;
    case VIRTIO_MMIO_DRIVER_FEATURES:
      write_driver_features(value);
      return;
    case VIRTIO_MMIO_QUEUE_SEL:
      queue_select_ = value;
      return;
    case VIRTIO_MMIO_QUEUE_READY:
      if (!legacy_) write_queue_ready(lock, value);
      return;
    default:
      break;
  }
  if (legacy_) {
    write_legacy(lock, offset, value);
    return;
  }
  Device::QueueSetup* const queue = selected_queue();
  if (queue == nullptr) return;
  uint32_t* size = nullptr;
  uint64_t* address = nullptr;
  bool high = false;
  switch (offset) {
    case VIRTIO_MMIO_QUEUE_NUM:
      size = &queue->layout.size;
      break;
    case VIRTIO_MMIO_QUEUE_DESC_HIGH:
      high = true;
      [[fallthrough]];
    case VIRTIO_MMIO_QUEUE_DESC_LOW:
      address = &queue->layout.descriptors;
      break;
    case VIRTIO_MMIO_QUEUE_AVAIL_HIGH:
      high = true;
      [[fallthrough]];
    case VIRTIO_MMIO_QUEUE_AVAIL_LOW:
      address = &queue->layout.available;
      break;
    case VIRTIO_MMIO_QUEUE_USED_HIGH:
      high = true;
      [[fallthrough]];
    case VIRTIO_MMIO_QUEUE_USED_LOW:
      address = &queue->layout.used;
      break;
    case kQueueReset:
    default:
      return;  // read-only or reserved
  }
  // A queue in use never moves: its place was checked when the device started.
  if (!may_set_up_queues() || queue->ready) {
    complain("wrote a queue register at the wrong time", offset);
    return;
  }
  if (size != nullptr) {
    *size = value;
  } else if (high) {
    set_high(*address, value);
  } else {
    set_low(*address, value);
  }
}

void MmioTransport::write_driver_features(uint32_t value) {
  constexpr uint32_t kMask =
      VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_FAILED;
  if (changing_ || (signals_.status() & kMask) != VIRTIO_CONFIG_S_DRIVER) {
    complain("wrote features at the wrong time", value);
    return;
  }
  switch (driver_features_select_) {
    case 0:
      set_low(driver_features_, value);
      break;
    case 1:
      set_high(driver_features_, value);
      break;
    default:
      // Nothing is offered there; taking it must make FEATURES_OK fail.
      unknown_features_ = unknown_features_ || value != 0;
      break;
  }
}

void MmioTransport::write_queue_ready(std::unique_lock<std::mutex>& lock, uint32_t value) {
  Device::QueueSetup* const queue = selected_queue();
  if (queue == nullptr || queue->ready == (value != 0)) return;
  if (may_set_up_queues()) {
    queue->ready = value != 0;
    return;
  }
  if (value != 0 || changing_ || !has(VIRTIO_CONFIG_S_DRIVER_OK)) {
    complain("wrote QueueReady at the wrong time", value);
    return;
  }
  take_queue_back(lock);
}

// A driver that takes back one queue of a running device. It cannot be started again without a
// reset.
void MmioTransport::take_queue_back(std::unique_lock<std::mutex>& lock) {
  const auto index = static_cast<uint16_t>(queue_select_);
  changing_ = true;
  lock.unlock();
  const bool stopped = device_.stop_queue(index);
  lock.lock();
  if (stopped) queues_[index].ready = false;
  changing_ = false;
  changed_.notify_all();
}

// --- Status ---

void MmioTransport::write_status(uint32_t value) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !changing_; });
  const uint32_t now = signals_.status() & kDriverBits;
  // Before virtio 1.0 there was no FEATURES_OK; it is ours here.
  const uint32_t wanted = legacy_ ? (value & ~uint32_t{VIRTIO_CONFIG_S_FEATURES_OK} & kDriverBits) |
                                        (now & VIRTIO_CONFIG_S_FEATURES_OK)
                                  : value & kDriverBits;
  if (value == 0) {
    reset_device(lock);
  } else if ((now & ~wanted) != 0) {
    complain("tried to clear status bits without a reset", value);
  } else {
    add_driver_status(lock, wanted & ~now);
  }
}

void MmioTransport::add_driver_status(std::unique_lock<std::mutex>& lock, uint32_t added) {
  constexpr uint32_t kEarly =
      VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FAILED;
  signals_.add_status(added & kEarly);
  if (has(VIRTIO_CONFIG_S_FAILED) || has(VIRTIO_CONFIG_S_NEEDS_RESET)) return;
  if ((added & VIRTIO_CONFIG_S_FEATURES_OK) != 0) {
    // Left clear if refused; the driver reads it back to find out.
    if (!has(VIRTIO_CONFIG_S_ACKNOWLEDGE) || !has(VIRTIO_CONFIG_S_DRIVER)) {
      complain("set FEATURES_OK before DRIVER", added);
    } else if (!features_acceptable()) {
      complain("chose features that are not offered, or not VERSION_1", driver_features_);
    } else {
      device_.accept_features(driver_features_);
      signals_.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
    }
  }
  if ((added & VIRTIO_CONFIG_S_DRIVER_OK) == 0) return;
  if (legacy_ && !accept_legacy_features()) return;
  if (has(VIRTIO_CONFIG_S_FEATURES_OK)) {
    start_device(lock);
  } else {
    complain("set DRIVER_OK before FEATURES_OK", added);
  }
}

bool MmioTransport::features_acceptable() const {
  return !unknown_features_ && (driver_features_ & ~offered_features()) == 0 &&
         (legacy_ || (driver_features_ >> VIRTIO_F_VERSION_1 & 1) != 0);
}

void MmioTransport::start_device(std::unique_lock<std::mutex>& lock) {
  changing_ = true;
  // Before the queues run, so that whatever they find is told by an interrupt.
  signals_.add_status(VIRTIO_CONFIG_S_DRIVER_OK);
  lock.unlock();
  try {
    // Nobody changes queues_ while changing_ is set.
    device_.activate(queues_);
  } catch (const std::exception& e) {
    uint64_t suppressed = 0;
    if (complaints_.allow(&suppressed)) {
      base::log_warning("{}: cannot start as the guest set it up: {}; the guest must reset it",
                        name_, e.what());
    }
    signals_.needs_reset();
  }
  lock.lock();
  changing_ = false;
  changed_.notify_all();
}

void MmioTransport::reset_device(std::unique_lock<std::mutex>& lock) {
  changing_ = true;
  lock.unlock();
  const bool idle = device_.reset();
  lock.lock();
  if (idle) {
    forget_driver();
    signals_.clear();
  } else {
    // Given up on: the driver must not believe that its memory is its own again.
    signals_.needs_reset();
  }
  changing_ = false;
  changed_.notify_all();
}

std::string MmioTransport::describe() const {
  const std::lock_guard lock(mutex_);
  const uint32_t status = signals_.status();
  std::string words;
  const auto add = [&](uint32_t bit, const char* word) {
    if ((status & bit) != 0) words += (words.empty() ? "" : " ") + std::string(word);
  };
  add(VIRTIO_CONFIG_S_ACKNOWLEDGE, "ACKNOWLEDGE");
  add(VIRTIO_CONFIG_S_DRIVER, "DRIVER");
  add(VIRTIO_CONFIG_S_FEATURES_OK, "FEATURES_OK");
  add(VIRTIO_CONFIG_S_DRIVER_OK, "DRIVER_OK");
  add(VIRTIO_CONFIG_S_NEEDS_RESET, "NEEDS_RESET");
  add(VIRTIO_CONFIG_S_FAILED, "FAILED");
  return fmt::format(
      "{}: virtio-mmio{}, status {}, features {:#x} of {:#x}, interrupt status {:#x}, "
      "{} interrupts{}",
      name_, legacy_ ? " (legacy)" : "", words.empty() ? "0 (no driver)" : words, driver_features_,
      offered_features(), signals_.interrupt_status(), signals_.interrupts(),
      changing_ ? ", changing state" : "");
}

}  // namespace minivmm::virtio
