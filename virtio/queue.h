// SPDX-License-Identifier: Apache-2.0
// The device's side of a split virtqueue.
//
// Belongs to one thread (a queue's event loop); the guest is on the other side of the shared
// memory. Everything in that memory is hostile: each descriptor is copied once and the copy is
// checked, and nothing the guest writes can make a call here long, loop, or touch memory outside
// the guest's. What breaks the protocol breaks the queue: from then on it yields nothing.
//
// Layout of the shared parts, little-endian (n = size):
//   descriptors  16 n    {address u64, length u32, flags u16, next u16}
//   available    2 n + 6 {flags u16, index u16, ring u16[n], used_event u16}
//   used         8 n + 6 {flags u16, index u16, ring {id u32, length u32}[n], avail_event u16}
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "virtio/guest_memory.h"

namespace minivmm::virtio {

// The specification's names and values (the kernel's header for these is not C++).
inline constexpr unsigned VIRTIO_F_INDIRECT_DESC = 28;  // feature bits
inline constexpr unsigned VIRTIO_F_EVENT_IDX = 29;
inline constexpr uint16_t VIRTQ_DESC_F_NEXT = 1;
inline constexpr uint16_t VIRTQ_DESC_F_WRITE = 2;
inline constexpr uint16_t VIRTQ_DESC_F_INDIRECT = 4;
inline constexpr uint16_t VIRTQ_AVAIL_F_NO_INTERRUPT = 1;
inline constexpr uint16_t VIRTQ_USED_F_NO_NOTIFY = 1;

// Where the driver has put a queue. Guest physical addresses.
struct QueueLayout {
  uint32_t size = 0;
  uint64_t descriptors = 0;
  uint64_t available = 0;
  uint64_t used = 0;
};

struct QueueFeatures {
  bool indirect = false;
  bool event_index = false;
};

// What a driver did to break a queue.
enum class QueueFault : uint8_t {
  kNone,
  kIndexJump,
  kHeadOutOfRange,
  kNextOutOfRange,
  kLoop,
  kTooManySegments,
  kTooManyBytes,
  kBadAddress,
  kReadableAfterWritable,
  kIndirectNotNegotiated,
  kIndirectNested,
  kIndirectChained,
  kIndirectBadLength,
  kIndirectBadAddress,
  kNoStatusByte,  // found by the block device: there is nowhere to answer to
};
// "a descriptor chain loops", for messages.
const char* fault_text(QueueFault fault) noexcept;

// A request as the driver chained it: device-readable segments first, then device-writable ones.
struct Chain {
  uint16_t head = 0;
  uint32_t readable = 0;  // segments
  uint32_t writable = 0;
};

class Queue {
 public:
  // `max_segments` bounds what one chain may have, and what an indirect table may hold. `memory`
  // outlives the queue. Throws base::Error(EINVAL) that says what is wrong with the layout.
  Queue(const GuestMemory& memory, const QueueLayout& layout, QueueFeatures features,
        uint32_t max_segments);

  enum class Pop { kEmpty, kChain, kBroken };
  // Takes the next request; its segments, as host addresses, go to `segments` (at least
  // max_segments of them). Segments without bytes are left out.
  Pop pop(std::span<iovec> segments, Chain& chain) noexcept;
  // True if pop() would not say kEmpty, also for a broken queue. One load.
  bool has_available() noexcept;

  // Gives a request back. Not seen by the driver before publish().
  void push_used(uint16_t head, uint32_t written_bytes) noexcept;
  // Makes all that was pushed visible in one store. True if the driver wants an interrupt for it.
  bool publish() noexcept;
  bool unpublished() const noexcept { return next_used_ != published_used_; }

  // Asks the driver to notify us of its next request. False if one is there already, for which no
  // notification may come. True also for a broken queue.
  bool enable_notifications() noexcept;
  // A hint: notifications may still come.
  void disable_notifications() noexcept;

  void break_with(QueueFault fault) noexcept { fault_ = fault; }
  QueueFault fault() const noexcept { return fault_; }
  uint16_t size() const noexcept { return size_; }
  uint16_t next_available() const noexcept { return next_available_; }
  uint16_t next_used() const noexcept { return next_used_; }

 private:
  struct Walk;
  bool refresh_available() noexcept;
  bool walk_chain(std::span<iovec> segments, Chain& chain) noexcept;
  bool enter_indirect(Walk& walk, uint64_t address, uint32_t length, uint16_t flags) noexcept;
  bool add_segment(Walk& walk, uint64_t address, uint32_t length, bool writable) noexcept;
  bool fail(QueueFault fault) noexcept;

  const GuestMemory* memory_;
  std::byte* descriptors_;
  std::byte* available_;
  std::byte* used_;
  uint16_t size_;
  uint32_t max_segments_;
  QueueFeatures features_;
  QueueFault fault_ = QueueFault::kNone;
  uint16_t next_available_ = 0;  // the next ring entry to take
  uint16_t seen_available_ = 0;  // the driver's index when last looked at
  uint16_t next_used_ = 0;       // the next ring entry to fill
  uint16_t published_used_ = 0;  // our index as the driver sees it
};

// True if moving an index from `old_index` to `new_index` passed `event`, modulo 2^16: the test
// both sides use to decide on a notification.
constexpr bool index_passed(uint16_t event, uint16_t new_index, uint16_t old_index) noexcept {
  return static_cast<uint16_t>(new_index - event - 1) <
         static_cast<uint16_t>(new_index - old_index);
}

}  // namespace minivmm::virtio
