// SPDX-License-Identifier: Apache-2.0
#include "virtio_queue.h"

#include "arena.h"

namespace minivmm::probe {
namespace {

constexpr uint16_t kNext = 1;
constexpr uint16_t kDeviceWrites = 2;
constexpr uint16_t kIndirect = 4;
constexpr uint16_t kNoInterrupt = 1;
constexpr uint16_t kNoNotify = 1;

void full_barrier() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
// x86 keeps stores in order; only the compiler must be told.
void store_barrier() { asm volatile("" : : : "memory"); }

bool event_due(uint16_t event, uint16_t now, uint16_t before) {
  return static_cast<uint16_t>(now - event - 1) < static_cast<uint16_t>(now - before);
}

void clear(volatile void* memory, uint64_t bytes) {
  auto* at = static_cast<volatile uint8_t*>(memory);
  for (uint64_t i = 0; i < bytes; ++i) at[i] = 0;
}

bool device_writes_data(uint32_t type) { return type == kBlkIn || type == kBlkGetId; }

}  // namespace

bool Queue::start(uint16_t index, uint16_t size, bool event_idx, volatile uint32_t* notify) {
  if (table_ == nullptr) {
    table_ = static_cast<Descriptor*>(Arena::allocate(sizeof(Descriptor) * kMaxQueueSize, 4096));
    available_ = static_cast<Available*>(Arena::allocate(sizeof(Available), 64));
    used_ = static_cast<Used*>(Arena::allocate(sizeof(Used), 64));
    slots_ = static_cast<Slot*>(Arena::allocate(sizeof(Slot) * kMaxQueueSize, 64));
  }
  if (table_ == nullptr || available_ == nullptr || used_ == nullptr || slots_ == nullptr) {
    return false;
  }
  clear(available_, sizeof *available_);
  clear(used_, sizeof *used_);
  clear(slots_, sizeof(Slot) * kMaxQueueSize);
  free_head_ = 0;
  published_ = announced_ = taken_ = 0;
  in_flight_ = 0;
  kicks_ = 0;
  notify_ = notify;
  index_ = index;
  size_ = size;
  event_idx_ = event_idx;
  free_count_ = size;
  for (uint16_t i = 0; i < size; ++i) table_[i].next = static_cast<uint16_t>(i + 1);
  want_interrupt(false);
  return true;
}

uint16_t Queue::take_free() {
  const uint16_t head = free_head_;
  free_head_ = table_[head].next;
  --free_count_;
  return head;
}

void Queue::put_free(uint16_t head) {
  uint16_t count = slots_[head].descriptors;
  uint16_t last = head;
  while (--count > 0) last = table_[last].next;
  table_[last].next = free_head_;
  free_head_ = head;
  free_count_ = static_cast<uint16_t>(free_count_ + slots_[head].descriptors);
}

// The chain of a request, without `next` links: header, data, status. Returns how many descriptors.
uint32_t Queue::build(Request& request, Slot& slot, const QueueOptions& options,
                      Descriptor* out) const {
  slot.type = request.type;
  slot.reserved = 0;
  slot.sector = request.sector;
  slot.status = kStatusNotWritten;
  uint32_t n = 0;
  out[n++] = {reinterpret_cast<uint64_t>(&slot.type), 16, kNext, 0};
  uint32_t piece = request.length;
  if (options.segments > 1) piece = (piece / options.segments + 511) & ~uint32_t{511};
  if (piece == 0) piece = request.length;
  if (options.segment_max != 0 && piece > options.segment_max) piece = options.segment_max;
  const uint16_t direction = device_writes_data(request.type) ? kDeviceWrites : 0;
  for (uint32_t at = 0; at < request.length && n < kMaxSegments + 2; at += piece) {
    const uint32_t length = request.length - at < piece ? request.length - at : piece;
    out[n++] = {reinterpret_cast<uint64_t>(request.data) + at, length,
                static_cast<uint16_t>(direction | kNext), 0};
    if (n == kMaxSegments + 1 && at + length < request.length) return 0;
  }
  out[n++] = {reinterpret_cast<uint64_t>(&slot.status), 1, kDeviceWrites, 0};
  return n;
}

bool Queue::add(Request& request, const QueueOptions& options, bool* bad) {
  if (free_count_ == 0) return false;
  Slot& slot = slots_[free_head_];
  const uint32_t count = build(request, slot, options, slot.indirect);
  const bool indirect = options.indirect;
  const uint32_t needed = indirect ? 1 : count;
  if (count == 0 || needed > size_) {
    *bad = true;
    return false;
  }
  if (needed > free_count_) return false;

  const uint16_t head = take_free();
  if (indirect) {
    for (uint32_t i = 0; i + 1 < count; ++i) slot.indirect[i].next = static_cast<uint16_t>(i + 1);
    const uint16_t link = table_[head].next;
    table_[head] = {reinterpret_cast<uint64_t>(slot.indirect),
                    static_cast<uint32_t>(count * sizeof(Descriptor)), kIndirect, link};
  } else {
    // The free list is the chain: `next` is kept, so that put_free can give it back as it is.
    uint16_t at = head;
    for (uint32_t i = 0; i < count; ++i) {
      const uint16_t link = table_[at].next;
      table_[at] = slot.indirect[i];
      table_[at].next = link;
      if (i + 1 < count) at = take_free();
    }
  }
  slot.request = &request;
  slot.descriptors = static_cast<uint16_t>(needed);
  request.done = false;
  available_->ring[published_ % size_] = head;
  ++published_;
  ++in_flight_;
  return true;
}

void Queue::kick() {
  if (published_ == announced_) return;
  store_barrier();
  available_->index = published_;
  // The device's wish is read only after it can see the new index.
  full_barrier();
  bool wanted = false;
  if (event_idx_) {
    // avail_event is the low half of the word behind the ring.
    const auto event = static_cast<uint16_t>(used_->ring[size_].id);
    wanted = event_due(event, published_, announced_);
  } else {
    wanted = (used_->flags & kNoNotify) == 0;
  }
  announced_ = published_;
  if (wanted) {
    ++kicks_;
    *notify_ = index_;
  }
}

Request* Queue::take(bool* broken) {
  if (!has_completed()) return nullptr;
  store_barrier();
  const UsedElement& element = used_->ring[taken_ % size_];
  const uint32_t head = element.id;
  const uint32_t written = element.length;
  if (head >= size_ || slots_[head].request == nullptr) {
    *broken = true;
    return nullptr;
  }
  ++taken_;
  Slot& slot = slots_[head];
  Request* request = slot.request;
  slot.request = nullptr;
  request->status = slot.status;
  request->written = written;
  request->done = true;
  put_free(static_cast<uint16_t>(head));
  --in_flight_;
  return request;
}

void Queue::want_interrupt(bool want) {
  if (event_idx_) {
    // An event index just behind us is 65,535 completions away.
    available_->ring[size_] = want ? taken_ : static_cast<uint16_t>(taken_ - 1);
  } else {
    available_->flags = want ? 0 : kNoInterrupt;
  }
  full_barrier();
}

}  // namespace minivmm::probe
