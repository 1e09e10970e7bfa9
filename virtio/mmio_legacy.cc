// SPDX-License-Identifier: Apache-2.0
// What version 1 of the register window does otherwise: no FEATURES_OK and no VERSION_1, features
// of 32 bits, and a queue is one area of memory, given by the number of its first page.
#include <linux/virtio_mmio.h>

#include "virtio/mmio_transport.h"

namespace minivmm::virtio {
namespace {

constexpr uint64_t kDescriptorBytes = 16;
constexpr uint64_t kUsualAlignment = 4096;
constexpr uint32_t kMaxPageSize = 1 << 30;

constexpr bool power_of_two(uint64_t value) noexcept {
  return value != 0 && (value & (value - 1)) == 0;
}

}  // namespace

uint64_t MmioTransport::offered_features() const noexcept {
  return legacy_ ? device_.features() & 0xffffffff : device_.features();
}

uint32_t MmioTransport::read_legacy(uint64_t offset, const Device::QueueSetup* queue) const {
  if (offset != VIRTIO_MMIO_QUEUE_PFN || queue == nullptr) return 0;
  return queue_pages_[queue_select_];
}

void MmioTransport::write_legacy(std::unique_lock<std::mutex>& lock, uint64_t offset,
                                 uint32_t value) {
  if (offset == VIRTIO_MMIO_GUEST_PAGE_SIZE) {
    guest_page_size_ = value;
    return;
  }
  Device::QueueSetup* const queue = selected_queue();
  if (queue == nullptr) return;
  switch (offset) {
    case VIRTIO_MMIO_QUEUE_NUM:
    case VIRTIO_MMIO_QUEUE_ALIGN:
      if (queue->ready || changing_ || has(VIRTIO_CONFIG_S_DRIVER_OK)) {
        complain("wrote a queue register at the wrong time", offset);
      } else if (offset == VIRTIO_MMIO_QUEUE_NUM) {
        queue->layout.size = value;
      } else {
        queue_alignments_[queue_select_] = value;
      }
      return;
    case VIRTIO_MMIO_QUEUE_PFN:
      place_legacy_queue(lock, value);
      return;
    default:
      return;  // read-only or reserved
  }
}

void MmioTransport::place_legacy_queue(std::unique_lock<std::mutex>& lock, uint32_t page) {
  Device::QueueSetup& queue = queues_[queue_select_];
  if (changing_) return;
  if (page == 0) {
    if (!queue.ready) return;
    queue_pages_[queue_select_] = 0;
    if (has(VIRTIO_CONFIG_S_DRIVER_OK)) {
      take_queue_back(lock);
    } else {
      queue.ready = false;
    }
    return;
  }
  const uint64_t alignment =
      queue_alignments_[queue_select_] == 0 ? kUsualAlignment : queue_alignments_[queue_select_];
  const uint64_t size = queue.layout.size;
  // Sizes and places beyond memory are found when the device starts.
  if (queue.ready || has(VIRTIO_CONFIG_S_DRIVER_OK) || !power_of_two(guest_page_size_) ||
      guest_page_size_ > kMaxPageSize || !power_of_two(alignment) || size > UINT16_MAX) {
    complain("placed a queue at the wrong time, or with impossible sizes", page);
    return;
  }
  queue_pages_[queue_select_] = page;
  queue.layout.descriptors = uint64_t{page} * guest_page_size_;
  queue.layout.available = queue.layout.descriptors + size * kDescriptorBytes;
  // Flags, index, the ring, and the event index that stands behind it.
  const uint64_t end = queue.layout.available + 4 + size * 2 + 2;
  queue.layout.used = (end + alignment - 1) & ~(alignment - 1);
  queue.ready = true;
}

// With DRIVER_OK, which is all that such a driver says. False: refused.
bool MmioTransport::accept_legacy_features() {
  if (!features_acceptable()) {
    complain("chose features that are not offered", driver_features_);
    signals_.needs_reset();
    return false;
  }
  device_.accept_features(driver_features_);
  signals_.add_status(VIRTIO_CONFIG_S_FEATURES_OK);
  return true;
}

}  // namespace minivmm::virtio
