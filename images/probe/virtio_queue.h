// SPDX-License-Identifier: Apache-2.0
// The driver's side of one split virtqueue with block requests on it. Requests are added, the
// device is told once for a batch, completed ones are taken. Used by one thread.
#pragma once

#include <cstdint>

namespace minivmm::probe {

inline constexpr uint32_t kMaxQueueSize = 256;
inline constexpr uint32_t kMaxSegments = 32;

// Request types of virtio-blk.
enum BlkType : uint32_t {
  kBlkIn = 0,
  kBlkOut = 1,
  kBlkFlush = 4,
  kBlkGetId = 8,
  kBlkDiscard = 11,
  kBlkWriteZeroes = 13,
};
inline constexpr uint8_t kBlkOk = 0;
inline constexpr uint8_t kBlkIoError = 1;
inline constexpr uint8_t kBlkUnsupported = 2;
inline constexpr uint8_t kStatusNotWritten = 0xff;

struct Request {
  uint32_t type = kBlkIn;
  uint64_t sector = 0;
  void* data = nullptr;
  uint32_t length = 0;  // bytes of data
  bool done = false;
  uint8_t status = kStatusNotWritten;
  uint32_t written = 0;   // what the device says it wrote, with the status byte
  uint64_t tag = 0;       // the caller's
  uint64_t begin_ns = 0;  // the caller's
};

struct QueueOptions {
  bool indirect = true;      // if the device offers it
  uint32_t segments = 1;     // into how many pieces data is cut at least
  uint32_t segment_max = 0;  // most bytes of one piece, 0 = no limit
};

class Queue {
 public:
  struct Descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
  };

  // An empty queue; again after a reset of the device, with the memory it has. False if there is
  // none. `notify` is the device's QueueNotify register.
  bool start(uint16_t index, uint16_t size, bool event_idx, volatile uint32_t* notify);

  // False while there is no room; the request must live until it is done. `bad` is set where it can
  // never fit.
  bool add(Request& request, const QueueOptions& options, bool* bad);
  // Tells the device about what was added, if it wants to be told.
  void kick();
  // The next completed request, or nullptr. `*broken` is set if the device returned nonsense.
  Request* take(bool* broken);

  bool has_completed() const { return used_->index != taken_; }
  uint32_t in_flight() const { return in_flight_; }
  uint16_t size() const { return size_; }
  uint64_t kicks() const { return kicks_; }
  // Asks for an interrupt on the next completion, or for none. After asking, look once more at
  // has_completed() before sleeping.
  void want_interrupt(bool want);

  uint64_t descriptor_address() const { return reinterpret_cast<uint64_t>(table_); }
  uint64_t available_address() const { return reinterpret_cast<uint64_t>(available_); }
  uint64_t used_address() const { return reinterpret_cast<uint64_t>(used_); }

 private:
  struct Available {
    volatile uint16_t flags;
    volatile uint16_t index;
    volatile uint16_t ring[kMaxQueueSize + 1];  // used_event behind `size` entries
  };
  struct UsedElement {
    volatile uint32_t id;
    volatile uint32_t length;
  };
  struct Used {
    volatile uint16_t flags;
    volatile uint16_t index;
    UsedElement ring[kMaxQueueSize + 1];  // avail_event behind `size` entries
  };
  // What a request needs in memory beside its data, one for each possible head.
  struct Slot {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
    Descriptor indirect[kMaxSegments + 2];
    volatile uint8_t status;
    Request* request;
    uint16_t descriptors;  // taken from the table
  };

  uint32_t build(Request& request, Slot& slot, const QueueOptions& options, Descriptor* out) const;
  uint16_t take_free();
  void put_free(uint16_t head);

  Descriptor* table_ = nullptr;
  Available* available_ = nullptr;
  Used* used_ = nullptr;
  Slot* slots_ = nullptr;
  volatile uint32_t* notify_ = nullptr;
  uint16_t index_ = 0;
  uint16_t size_ = 0;
  bool event_idx_ = false;
  uint16_t free_head_ = 0;
  uint16_t free_count_ = 0;
  uint16_t published_ = 0;  // our copy of available_->index
  uint16_t announced_ = 0;  // its value at the last kick
  uint16_t taken_ = 0;      // completed ones taken
  uint32_t in_flight_ = 0;
  uint64_t kicks_ = 0;
};

}  // namespace minivmm::probe
