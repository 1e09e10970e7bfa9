// SPDX-License-Identifier: Apache-2.0
#include "virtio/queue.h"

#include <bit>
#include <cerrno>

#include <fmt/core.h>

#include "base/bytes.h"
#include "base/error.h"
#include "virtio/guest_access.h"

namespace minivmm::virtio {
namespace {

constexpr uint32_t kMaxQueueSize = 32768;
constexpr uint64_t kMaxChainBytes = uint64_t{1} << 32;
constexpr size_t kDescriptorBytes = 16;
constexpr size_t kUsedElementBytes = 8;
// Of the available and the used ring.
constexpr size_t kFlags = 0;
constexpr size_t kIndex = 2;
constexpr size_t kRing = 4;

struct Descriptor {
  uint64_t address;
  uint32_t length;
  uint16_t flags;
  uint16_t next;
};

Descriptor copy_descriptor(const std::byte* table, uint32_t index) noexcept {
  std::byte raw[kDescriptorBytes];
  copy_from_guest(raw, table + size_t{index} * kDescriptorBytes, sizeof raw);
  return {base::load_le<uint64_t>(raw), base::load_le<uint32_t>(raw + 8),
          base::load_le<uint16_t>(raw + 12), base::load_le<uint16_t>(raw + 14)};
}

std::byte* map_part(const GuestMemory& memory, const char* what, uint64_t address, uint64_t length,
                    uint64_t alignment) {
  std::byte* const host = memory.at(address, length);
  if (host == nullptr) {
    throw base::Error(EINVAL, fmt::format("{} at {:#x}, {} bytes, is not in guest memory", what,
                                          address, length));
  }
  // The host address counts for our atomics; the guest's for the specification.
  if (address % alignment != 0 || reinterpret_cast<uintptr_t>(host) % alignment != 0) {
    throw base::Error(EINVAL,
                      fmt::format("{} at {:#x} is not {}-aligned", what, address, alignment));
  }
  return host;
}

}  // namespace

const char* fault_text(QueueFault fault) noexcept {
  switch (fault) {
    case QueueFault::kNone:
      return "nothing is wrong";
    case QueueFault::kIndexJump:
      return "the available index moved by more than the queue's size";
    case QueueFault::kHeadOutOfRange:
      return "a ring entry names a descriptor that does not exist";
    case QueueFault::kNextOutOfRange:
      return "a descriptor's next one does not exist";
    case QueueFault::kLoop:
      return "a descriptor chain loops";
    case QueueFault::kTooManySegments:
      return "a descriptor chain is longer than the queue";
    case QueueFault::kTooManyBytes:
      return "a descriptor chain has more than 4 GiB";
    case QueueFault::kBadAddress:
      return "a buffer is not in guest memory";
    case QueueFault::kReadableAfterWritable:
      return "a device-readable descriptor follows a device-writable one";
    case QueueFault::kIndirectNotNegotiated:
      return "an indirect descriptor was used without negotiation";
    case QueueFault::kIndirectNested:
      return "an indirect table holds an indirect descriptor";
    case QueueFault::kIndirectChained:
      return "an indirect descriptor has a next one";
    case QueueFault::kIndirectBadLength:
      return "an indirect table is empty, not a whole number of descriptors, or too long";
    case QueueFault::kIndirectBadAddress:
      return "an indirect table is not in guest memory";
    case QueueFault::kNoStatusByte:
      return "a request has no room for its status";
  }
  return "unknown";
}

Queue::Queue(const GuestMemory& memory, const QueueLayout& layout, QueueFeatures features,
             uint32_t max_segments)
    : memory_(&memory), max_segments_(max_segments), features_(features) {
  if (!std::has_single_bit(layout.size) || layout.size > kMaxQueueSize) {
    throw base::Error(EINVAL, fmt::format("queue size {} is not a power of two up to {}",
                                          layout.size, kMaxQueueSize));
  }
  size_ = static_cast<uint16_t>(layout.size);
  const uint64_t n = layout.size;
  descriptors_ =
      map_part(memory, "the descriptor table", layout.descriptors, n * kDescriptorBytes, 16);
  available_ = map_part(memory, "the available ring", layout.available, n * 2 + 6, 2);
  used_ = map_part(memory, "the used ring", layout.used, n * kUsedElementBytes + 6, 4);
}

bool Queue::fail(QueueFault fault) noexcept {
  fault_ = fault;
  return false;
}

bool Queue::refresh_available() noexcept {
  // Acquire: the ring entries and descriptors that the index covers are read after it.
  const uint16_t index = load_u16(available_ + kIndex, std::memory_order_acquire);
  if (static_cast<uint16_t>(index - next_available_) > size_) return fail(QueueFault::kIndexJump);
  seen_available_ = index;
  return true;
}

bool Queue::has_available() noexcept {
  if (fault_ != QueueFault::kNone) return true;
  if (next_available_ != seen_available_) return true;
  return !refresh_available() || next_available_ != seen_available_;
}

Queue::Pop Queue::pop(std::span<iovec> segments, Chain& chain) noexcept {
  if (fault_ != QueueFault::kNone) return Pop::kBroken;
  if (next_available_ == seen_available_) {
    if (!refresh_available()) return Pop::kBroken;
    if (next_available_ == seen_available_) return Pop::kEmpty;
  }
  const size_t slot = next_available_ & (size_ - 1U);
  chain = {};
  chain.head = load_u16(available_ + kRing + slot * 2, std::memory_order_relaxed);
  ++next_available_;
  if (chain.head >= size_) {
    fail(QueueFault::kHeadOutOfRange);
    return Pop::kBroken;
  }
  return walk_chain(segments, chain) ? Pop::kChain : Pop::kBroken;
}

struct Queue::Walk {
  const std::byte* table;
  uint32_t entries;
  uint32_t visited = 0;  // in this table; more than it has means a loop
  bool indirect = false;
  uint64_t bytes = 0;
  std::span<iovec> segments;
  Chain& chain;
};

bool Queue::walk_chain(std::span<iovec> segments, Chain& chain) noexcept {
  Walk walk{.table = descriptors_,
            .entries = size_,
            .segments = segments.first(max_segments_),
            .chain = chain};
  uint32_t index = chain.head;
  for (;;) {
    if (index >= walk.entries) return fail(QueueFault::kNextOutOfRange);
    if (walk.visited++ == walk.entries) return fail(QueueFault::kLoop);
    const Descriptor d = copy_descriptor(walk.table, index);
    if ((d.flags & VIRTQ_DESC_F_INDIRECT) != 0) {
      if (!enter_indirect(walk, d.address, d.length, d.flags)) return false;
      index = 0;
      continue;
    }
    if (!add_segment(walk, d.address, d.length, (d.flags & VIRTQ_DESC_F_WRITE) != 0)) return false;
    if ((d.flags & VIRTQ_DESC_F_NEXT) == 0) return true;
    index = d.next;
  }
}

bool Queue::enter_indirect(Walk& walk, uint64_t address, uint32_t length, uint16_t flags) noexcept {
  if (!features_.indirect) return fail(QueueFault::kIndirectNotNegotiated);
  if (walk.indirect) return fail(QueueFault::kIndirectNested);
  if ((flags & VIRTQ_DESC_F_NEXT) != 0) return fail(QueueFault::kIndirectChained);
  if (length == 0 || length % kDescriptorBytes != 0 || length / kDescriptorBytes > max_segments_) {
    return fail(QueueFault::kIndirectBadLength);
  }
  walk.table = memory_->at(address, length);
  if (walk.table == nullptr) return fail(QueueFault::kIndirectBadAddress);
  walk.entries = static_cast<uint32_t>(length / kDescriptorBytes);
  walk.visited = 0;
  walk.indirect = true;
  return true;
}

bool Queue::add_segment(Walk& walk, uint64_t address, uint32_t length, bool writable) noexcept {
  Chain& chain = walk.chain;
  if (!writable && chain.writable != 0) return fail(QueueFault::kReadableAfterWritable);
  if (length == 0) return true;
  const uint32_t count = chain.readable + chain.writable;
  if (count == walk.segments.size()) return fail(QueueFault::kTooManySegments);
  walk.bytes += length;
  if (walk.bytes > kMaxChainBytes) return fail(QueueFault::kTooManyBytes);
  std::byte* const host = memory_->at(address, length);
  if (host == nullptr) return fail(QueueFault::kBadAddress);
  walk.segments[count] = {host, length};
  ++(writable ? chain.writable : chain.readable);
  return true;
}

void Queue::push_used(uint16_t head, uint32_t written_bytes) noexcept {
  const size_t slot = next_used_ & (size_ - 1U);
  std::byte* const element = used_ + kRing + slot * kUsedElementBytes;
  base::store_le<uint32_t>(element, head);
  base::store_le<uint32_t>(element + 4, written_bytes);
  ++next_used_;
}

bool Queue::publish() noexcept {
  const uint16_t before = published_used_;
  if (before == next_used_) return false;
  published_used_ = next_used_;
  // Release: the elements, the data and the status bytes are visible before the index.
  store_u16(used_ + kIndex, published_used_, std::memory_order_release);
  // The driver stores used_event (or clears its flag) and then looks at our index; we store the
  // index and then look at that. Both sides need a full fence between, or both miss the other.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (features_.event_index) {
    const uint16_t event =
        load_u16(available_ + kRing + size_t{size_} * 2, std::memory_order_relaxed);
    return index_passed(event, published_used_, before);
  }
  return (load_u16(available_ + kFlags, std::memory_order_relaxed) & VIRTQ_AVAIL_F_NO_INTERRUPT) ==
         0;
}

bool Queue::enable_notifications() noexcept {
  if (fault_ != QueueFault::kNone) return true;
  if (features_.event_index) {
    store_u16(used_ + kRing + size_t{size_} * kUsedElementBytes, next_available_,
              std::memory_order_relaxed);
  } else {
    store_u16(used_ + kFlags, 0, std::memory_order_relaxed);
  }
  // As in publish(), with the roles turned round.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return !has_available();
}

void Queue::disable_notifications() noexcept {
  if (features_.event_index) {
    // An index that the driver has passed already: it comes there again after 2^16 requests.
    store_u16(used_ + kRing + size_t{size_} * kUsedElementBytes,
              static_cast<uint16_t>(next_available_ - 1), std::memory_order_relaxed);
  } else {
    store_u16(used_ + kFlags, VIRTQ_USED_F_NO_NOTIFY, std::memory_order_relaxed);
  }
}

}  // namespace minivmm::virtio
