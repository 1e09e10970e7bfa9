// SPDX-License-Identifier: Apache-2.0
#include "tests/unit/virtio/guest.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "virtio/guest_access.h"

namespace minivmm::virtio {
namespace {

std::byte* map(uint64_t bytes) {
  void* const p =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::byte*>(p);
}

}  // namespace

TestGuest::TestGuest()
    : low_(map(kSize)),
      high_(map(kHighSize)),
      memory_({{kBase, kSize, low_}, {kHighBase, kHighSize, high_}}) {}

TestGuest::~TestGuest() {
  ::munmap(low_, kSize);
  ::munmap(high_, kHighSize);
}

uint64_t TestGuest::allocate(uint64_t bytes, uint64_t alignment) {
  const uint64_t address = (next_ + alignment - 1) & ~(alignment - 1);
  next_ = address + bytes;
  if (next_ > kBase + kSize) throw std::runtime_error("test guest: out of memory");
  return address;
}

DriverQueue::DriverQueue(TestGuest& guest, uint16_t size, bool event_index)
    : guest_(guest), size_(size), event_index_(event_index), chains_(size) {
  layout_.size = size;
  layout_.descriptors = guest.allocate(size * 16U, 16);
  layout_.available = guest.allocate(size * 2U + 6, 2);
  layout_.used = guest.allocate(size * 8U + 6, 4);
  std::memset(guest.at(layout_.descriptors, size * 16U), 0, size * 16U);
  std::memset(guest.at(layout_.available, size * 2U + 6), 0, size * 2U + 6);
  std::memset(guest.at(layout_.used, size * 8U + 6), 0, size * 8U + 6);
  for (uint16_t i = size; i-- > 0;) free_.push_back(i);
}

uint16_t DriverQueue::take_descriptor() {
  if (free_.empty()) throw std::runtime_error("driver queue: no descriptor free");
  const uint16_t index = free_.back();
  free_.pop_back();
  return index;
}

void DriverQueue::write_descriptor(uint64_t table, uint16_t index, uint64_t address,
                                   uint32_t length, uint16_t flags, uint16_t next) {
  const uint64_t at = table + index * 16U;
  guest_.store<uint64_t>(at, address);
  guest_.store<uint32_t>(at + 8, length);
  guest_.store<uint16_t>(at + 12, flags);
  guest_.store<uint16_t>(at + 14, next);
}

uint16_t DriverQueue::add(std::span<const Buffer> buffers) {
  std::vector<uint16_t> chain;
  for (size_t i = 0; i < buffers.size(); ++i) chain.push_back(take_descriptor());
  for (size_t i = 0; i < buffers.size(); ++i) {
    const bool last = i + 1 == buffers.size();
    const auto flags = static_cast<uint16_t>((last ? 0 : VIRTQ_DESC_F_NEXT) |
                                             (buffers[i].writable ? VIRTQ_DESC_F_WRITE : 0));
    write_descriptor(layout_.descriptors, chain[i], buffers[i].address, buffers[i].length, flags,
                     last ? uint16_t{0} : chain[i + 1]);
  }
  const uint16_t head = chain.front();
  chains_[head] = std::move(chain);
  push_head(head);
  return head;
}

uint16_t DriverQueue::add_indirect(std::span<const Buffer> buffers) {
  const uint64_t table = guest_.allocate(buffers.size() * 16);
  for (size_t i = 0; i < buffers.size(); ++i) {
    const bool last = i + 1 == buffers.size();
    const auto flags = static_cast<uint16_t>((last ? 0 : VIRTQ_DESC_F_NEXT) |
                                             (buffers[i].writable ? VIRTQ_DESC_F_WRITE : 0));
    write_descriptor(table, static_cast<uint16_t>(i), buffers[i].address, buffers[i].length, flags,
                     last ? uint16_t{0} : static_cast<uint16_t>(i + 1));
  }
  const uint16_t head = take_descriptor();
  write_descriptor(layout_.descriptors, head, table, static_cast<uint32_t>(buffers.size() * 16),
                   VIRTQ_DESC_F_INDIRECT, 0);
  chains_[head] = {head};
  push_head(head);
  return head;
}

void DriverQueue::push_head(uint16_t head) {
  guest_.store<uint16_t>(layout_.available + 4 + (available_ % size_) * 2U, head);
  ++available_;
}

void DriverQueue::set_available_index(uint16_t index) {
  available_ = index;
  store_u16(guest_.at(layout_.available + 2, 2), index, std::memory_order_release);
}

bool DriverQueue::publish() {
  const uint16_t before = published_;
  published_ = available_;
  store_u16(guest_.at(layout_.available + 2, 2), available_, std::memory_order_release);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (event_index_) {
    // Written out, not index_passed(): a mistake there must not cancel itself out here. The event
    // lies among the indices before, before + 1, ..., published - 1.
    const uint16_t event = avail_event();
    for (uint16_t i = before; i != published_; ++i) {
      if (i == event) return true;
    }
    return false;
  }
  return (used_flags() & VIRTQ_USED_F_NO_NOTIFY) == 0;
}

uint16_t DriverQueue::used_index() const {
  return load_u16(guest_.at(layout_.used + 2, 2), std::memory_order_acquire);
}
uint16_t DriverQueue::used_flags() const {
  return load_u16(guest_.at(layout_.used, 2), std::memory_order_acquire);
}
uint16_t DriverQueue::avail_event() const {
  return load_u16(guest_.at(layout_.used + 4 + size_ * 8U, 2), std::memory_order_acquire);
}

bool DriverQueue::used_pending() const { return used_index() != used_; }

std::optional<DriverQueue::Used> DriverQueue::take_used() {
  if (!used_pending()) return std::nullopt;
  const uint64_t at = layout_.used + 4 + (used_ % size_) * 8U;
  const Used used{guest_.load<uint32_t>(at), guest_.load<uint32_t>(at + 4)};
  ++used_;
  if (used.id < size_) {
    for (const uint16_t index : chains_[used.id]) free_.push_back(index);
    chains_[used.id].clear();
  }
  return used;
}

void DriverQueue::want_interrupt_after(uint16_t ahead) {
  store_u16(guest_.at(layout_.available, 2), 0, std::memory_order_relaxed);
  store_u16(guest_.at(layout_.available + 4 + size_ * 2U, 2), uint16_t(used_ + ahead),
            std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void DriverQueue::suppress_interrupts() {
  store_u16(guest_.at(layout_.available, 2), VIRTQ_AVAIL_F_NO_INTERRUPT, std::memory_order_relaxed);
  // Far behind: passed after 2^15 more requests.
  store_u16(guest_.at(layout_.available + 4 + size_ * 2U, 2), uint16_t(used_ - 0x8000),
            std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

}  // namespace minivmm::virtio
