// SPDX-License-Identifier: Apache-2.0
// Plain memory that plays a guest's RAM, and a virtqueue driver on it: the other side of the rings,
// written independently of the device's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "virtio/guest_memory.h"
#include "virtio/queue.h"

namespace minivmm::virtio {

class TestGuest {
 public:
  static constexpr uint64_t kBase = 0x100000;
  static constexpr uint64_t kSize = 16 << 20;
  // A second region, not adjacent.
  static constexpr uint64_t kHighBase = uint64_t{1} << 32;
  static constexpr uint64_t kHighSize = 64 << 10;

  TestGuest();
  ~TestGuest();
  TestGuest(const TestGuest&) = delete;
  TestGuest& operator=(const TestGuest&) = delete;

  const GuestMemory& memory() const noexcept { return memory_; }

  // Takes memory for good; `alignment` is a power of two.
  uint64_t allocate(uint64_t bytes, uint64_t alignment = 16);
  std::byte* at(uint64_t address, uint64_t bytes = 1) const { return memory_.at(address, bytes); }
  template <typename T>
  void store(uint64_t address, T value) {
    std::memcpy(at(address, sizeof value), &value, sizeof value);
  }
  template <typename T>
  T load(uint64_t address) const {
    T value;
    std::memcpy(&value, at(address, sizeof value), sizeof value);
    return value;
  }
  std::span<std::byte> bytes(uint64_t address, uint64_t length) const {
    return {at(address, length), length};
  }

 private:
  std::byte* low_;
  std::byte* high_;
  GuestMemory memory_;
  uint64_t next_ = kBase;
};

struct Buffer {
  uint64_t address;
  uint32_t length;
  bool writable;
};

class DriverQueue {
 public:
  struct Used {
    uint32_t id;
    uint32_t length;
  };

  DriverQueue(TestGuest& guest, uint16_t size, bool event_index);

  const QueueLayout& layout() const noexcept { return layout_; }
  uint16_t size() const noexcept { return size_; }
  uint16_t free_descriptors() const noexcept { return static_cast<uint16_t>(free_.size()); }

  // Chains the buffers and puts them into the available ring; returns the head. The device sees
  // them after publish().
  uint16_t add(std::span<const Buffer> buffers);
  uint16_t add_indirect(std::span<const Buffer> buffers);
  // True if the device asked to be notified of what was added.
  bool publish();
  std::optional<Used> take_used();
  bool used_pending() const;
  // Asks for an interrupt once `ahead` more requests have been used.
  void want_interrupt_after(uint16_t ahead);
  void suppress_interrupts();

  // What a hostile driver does.
  void write_descriptor(uint64_t table, uint16_t index, uint64_t address, uint32_t length,
                        uint16_t flags, uint16_t next);
  void push_head(uint16_t head);
  void set_available_index(uint16_t index);
  void advance_available_index(uint16_t by) { set_available_index(uint16_t(available_ + by)); }

  uint16_t used_index() const;
  uint16_t used_flags() const;
  uint16_t avail_event() const;

  uint16_t available_index() const noexcept { return available_; }

 private:
  uint16_t take_descriptor();

  TestGuest& guest_;
  const uint16_t size_;
  const bool event_index_;
  QueueLayout layout_;
  std::vector<uint16_t> free_;
  std::vector<std::vector<uint16_t>> chains_;  // by head: the descriptors to free
  uint16_t available_ = 0;                     // our index
  uint16_t published_ = 0;
  uint16_t used_ = 0;  // next to look at
};

}  // namespace minivmm::virtio
