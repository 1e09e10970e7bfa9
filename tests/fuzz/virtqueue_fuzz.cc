// SPDX-License-Identifier: Apache-2.0
// A hostile guest against the virtio block and entropy devices: the input is a program of register
// accesses, stores to guest memory and requests. Found by it: crashes, sanitizer reports, accesses
// outside guest memory (which ends at a guard on both sides), and a device that does not come to
// rest after a reset.
//
// A first byte of 0xe0 or more chooses the device and its disk (FuzzChoices); otherwise it is a
// block device on a disk in memory. The program is a sequence of one byte (modulo kOps) and its
// operands, little-endian:
//   0 write   offset u16, size u8 (modulo 4: 1, 2, 4, 8 bytes), value
//   1 read    offset u16, size u8
//   2 start   refused-features u64, log2(size) u8: negotiates all but those, rings in their places
//   3 desc    queue u8, index u8, address u32, length u32, flags u16, next u16
//   4 push    queue u8, head u16: into the available ring, and visible
//   5 notify  queue u8
//   6 settle  lets the device run
//   7 reset
//   8 poke    address u32, length u8, bytes
//   9 index   queue u8, available index u16
//  10 request queue u8, type u8, sector u32, length u32: a well-formed chain of three descriptors
//  11 legacy  refused-features u32, log2(size) u8, log2(alignment) u8: as start, in the window of
//             version 1
//  12 resize  the disk, on the host's side
//  13 ranges  queue u8, type u8, count u8, then for each sector u32, sectors u32, flags u8: a
//  discard
//             or zeroing request
// Addresses count from the start of guest memory and may lie outside.
#include <linux/virtio_config.h>
#include <linux/virtio_mmio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>

#include "base/bytes.h"
#include "base/unique_fd.h"
#include "tests/fuzz/fuzz_input.h"
#include "tests/fuzz/virtqueue_device.h"

namespace minivmm::virtio {
namespace {

constexpr uint64_t kBase = 0x10000;
constexpr size_t kMemory = 128 << 10;
constexpr uint16_t kQueues = kFuzzQueues;
constexpr unsigned kMaxSteps = 400;
constexpr unsigned kOps = 14;
constexpr uint32_t kGuestPage = 4096;
// Rings of queue q lie at q * kRingSpace; requests use what follows.
constexpr uint64_t kRingSpace = 0x4000;
constexpr uint64_t kRing = 0x1000;
constexpr uint64_t kRequestSpace = kQueues * kRingSpace;

// Mapped once, between two pages that nothing may touch.
std::byte* guest_memory() {
  static std::byte* const memory = [] {
    constexpr size_t kGuard = 4096;
    void* const p =
        ::mmap(nullptr, kMemory + 2 * kGuard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    auto* const inside = static_cast<std::byte*>(p) + kGuard;
    if (::mprotect(inside, kMemory, PROT_READ | PROT_WRITE) != 0) std::abort();
    return inside;
  }();
  return memory;
}

using fuzz::Input;

class Guest {
 public:
  explicit Guest(FuzzChoices choices);
  void run(Input input);
  void finish();

 private:
  void step(Input& input);
  void set(uint64_t offset, uint32_t value);
  uint32_t get(uint64_t offset);
  void start(uint64_t refused, unsigned log_size);
  void start_legacy(uint32_t refused, unsigned log_size, unsigned log_alignment);
  void begin(unsigned log_size);
  void descriptor(uint16_t queue, uint16_t index, uint64_t address, uint32_t length, uint16_t flags,
                  uint16_t next);
  void push(uint16_t queue, uint16_t head);
  void request(uint16_t queue, uint32_t type, uint64_t sector, uint32_t length);
  void ranges(Input& input);
  void access(Input& input, bool write);
  void poke(Input& input);
  template <typename T>
  void store(uint64_t at, T value) {
    if (at <= kMemory - sizeof value) base::store_le(guest_memory() + at, value);
  }

  base::UniqueFd irq_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  GuestMemory memory_{{{kBase, kMemory, guest_memory()}}};
  std::unique_ptr<FuzzDevice> device_;
  std::array<uint16_t, kQueues> available_{};
  uint16_t size_ = 8;
  uint64_t ring_ = kRing;  // of available entries, behind a queue's descriptors
};

Guest::Guest(FuzzChoices choices) {
  std::memset(guest_memory(), 0, kMemory);
  device_ = make_fuzz_device(choices, memory_, irq_.get());
}

void Guest::set(uint64_t offset, uint32_t value) {
  std::byte data[4];
  base::store_le(data, value);
  device_->write(offset, data);
}

uint32_t Guest::get(uint64_t offset) {
  std::byte data[4];
  device_->read(offset, data);
  return base::load_le<uint32_t>(data);
}

void Guest::begin(unsigned log_size) {
  size_ = static_cast<uint16_t>(1U << (log_size % 6));
  available_ = {};
  set(VIRTIO_MMIO_STATUS, 0);
  set(VIRTIO_MMIO_STATUS, 1);
  set(VIRTIO_MMIO_STATUS, 3);
}

void Guest::start(uint64_t refused, unsigned log_size) {
  begin(log_size);
  ring_ = kRing;
  for (const uint32_t half : {0U, 1U}) {
    set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
    set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
    const auto without = static_cast<uint32_t>(refused >> (32 * half));
    set(VIRTIO_MMIO_DRIVER_FEATURES, get(VIRTIO_MMIO_DEVICE_FEATURES) & ~without);
  }
  set(VIRTIO_MMIO_STATUS, 11);
  for (uint16_t q = 0; q < kQueues; ++q) {
    const auto at = static_cast<uint32_t>(kBase + q * kRingSpace);
    set(VIRTIO_MMIO_QUEUE_SEL, q);
    set(VIRTIO_MMIO_QUEUE_NUM, size_);
    set(VIRTIO_MMIO_QUEUE_DESC_LOW, at);
    set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, at + static_cast<uint32_t>(ring_));
    set(VIRTIO_MMIO_QUEUE_USED_LOW, at + 0x2000);
    set(VIRTIO_MMIO_QUEUE_READY, 1);
    store<uint16_t>(q * kRingSpace + ring_ + 2, 0);
  }
  set(VIRTIO_MMIO_STATUS, 15);
}

void Guest::start_legacy(uint32_t refused, unsigned log_size, unsigned log_alignment) {
  begin(log_size);
  ring_ = size_ * uint64_t{16};
  set(VIRTIO_MMIO_GUEST_PAGE_SIZE, kGuestPage);
  set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
  set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
  set(VIRTIO_MMIO_DRIVER_FEATURES, get(VIRTIO_MMIO_DEVICE_FEATURES) & ~refused);
  for (uint16_t q = 0; q < kQueues; ++q) {
    const auto at = static_cast<uint32_t>(kBase + q * kRingSpace);
    set(VIRTIO_MMIO_QUEUE_SEL, q);
    set(VIRTIO_MMIO_QUEUE_NUM, size_);
    set(VIRTIO_MMIO_QUEUE_ALIGN, 1U << (log_alignment % 16));
    store<uint16_t>(q * kRingSpace + ring_ + 2, 0);
    set(VIRTIO_MMIO_QUEUE_PFN, at / kGuestPage);
  }
  set(VIRTIO_MMIO_STATUS, 7);
}

void Guest::descriptor(uint16_t queue, uint16_t index, uint64_t address, uint32_t length,
                       uint16_t flags, uint16_t next) {
  const uint64_t at = queue % kQueues * kRingSpace + index % 256U * 16;
  store<uint64_t>(at, kBase + address);
  store<uint32_t>(at + 8, length);
  store<uint16_t>(at + 12, flags);
  store<uint16_t>(at + 14, next);
}

void Guest::push(uint16_t queue, uint16_t head) {
  queue %= kQueues;
  const uint64_t ring = queue * kRingSpace + ring_;
  store<uint16_t>(ring + 4 + available_[queue] % size_ * 2U, head);
  store<uint16_t>(ring + 2, ++available_[queue]);
}

void Guest::request(uint16_t queue, uint32_t type, uint64_t sector, uint32_t length) {
  const auto first = static_cast<uint16_t>(available_[queue % kQueues] * 3 % 12);
  const uint64_t header = kRequestSpace + first * 32U;
  store<uint32_t>(header, type);
  store<uint64_t>(header + 8, sector);
  const bool to_guest = type == 0 || type == 8;
  descriptor(queue, first, header, 16, 1, uint16_t(first + 1));
  descriptor(queue, uint16_t(first + 1), kRequestSpace + 0x1000, length % (kMemory / 2),
             to_guest ? 3 : 1, uint16_t(first + 2));
  descriptor(queue, uint16_t(first + 2), header + 16, 1, 2, 0);
  push(queue, first);
}

// Up to four ranges, in the data of a request.
void Guest::ranges(Input& input) {
  const uint16_t queue = input.take<uint8_t>();
  const uint32_t type = input.take<uint8_t>() % 2 == 0 ? 11 : 13;  // discard, write zeroes
  const unsigned count = input.take<uint8_t>() % 5U;
  for (unsigned i = 0; i < count; ++i) {
    const uint64_t at = kRequestSpace + 0x1000 + i * 16;
    store<uint64_t>(at, input.take<uint32_t>());
    store<uint32_t>(at + 8, input.take<uint32_t>());
    store<uint32_t>(at + 12, input.take<uint8_t>());
  }
  request(queue, type, 0, count * 16);
}

void Guest::access(Input& input, bool write) {
  const uint64_t offset = input.take<uint16_t>() % 0x200;
  const size_t size = size_t{1} << (input.take<uint8_t>() % 4);
  std::byte data[8] = {};
  if (!write) {
    device_->read(offset, std::span(data).first(size));
    return;
  }
  for (size_t i = 0; i < size; ++i) data[i] = std::byte{input.take<uint8_t>()};
  device_->write(offset, std::span(data).first(size));
}

void Guest::poke(Input& input) {
  const uint64_t address = input.take<uint32_t>() % kMemory;
  const unsigned length = input.take<uint8_t>();
  for (unsigned i = 0; i < length; ++i) store<uint8_t>(address + i, input.take<uint8_t>());
}

void Guest::step(Input& input) {
  const unsigned op = input.take<uint8_t>() % kOps;
  switch (op) {
    case 0:
    case 1:
      return access(input, op == 0);
    case 2: {
      const auto refused = input.take<uint64_t>();
      return start(refused, input.take<uint8_t>());
    }
    case 3: {
      const uint16_t queue = input.take<uint8_t>();
      const uint16_t index = input.take<uint8_t>();
      const uint64_t address = input.take<uint32_t>();
      const auto length = input.take<uint32_t>();
      const auto flags = input.take<uint16_t>();
      return descriptor(queue, index, address, length, flags, input.take<uint16_t>());
    }
    case 4: {
      const uint16_t queue = input.take<uint8_t>();
      return push(queue, input.take<uint16_t>());
    }
    case 5:
      return set(VIRTIO_MMIO_QUEUE_NOTIFY, input.take<uint8_t>() % 4U);
    case 6:
      return FuzzWorld::instance().settle();
    case 7:
      return set(VIRTIO_MMIO_STATUS, 0);
    case 8:
      return poke(input);
    case 9: {
      const unsigned queue = input.take<uint8_t>() % kQueues;
      available_[queue] = input.take<uint16_t>();
      return store<uint16_t>(queue * kRingSpace + ring_ + 2, available_[queue]);
    }
    case 10: {
      const uint16_t queue = input.take<uint8_t>();
      const uint32_t type = input.take<uint8_t>() % 16U;
      const uint64_t sector = input.take<uint32_t>();
      return request(queue, type, sector, input.take<uint32_t>());
    }
    case 11: {
      const auto refused = input.take<uint32_t>();
      const unsigned log_size = input.take<uint8_t>();
      return start_legacy(refused, log_size, input.take<uint8_t>());
    }
    case 12:
      return device_->resize();
    default:
      return ranges(input);
  }
}

void Guest::run(Input input) {
  for (unsigned steps = 0; steps < kMaxSteps && !input.empty(); ++steps) step(input);
  for (uint32_t q = 0; q < kQueues; ++q) set(VIRTIO_MMIO_QUEUE_NOTIFY, q);
  FuzzWorld::instance().settle();
}

void Guest::finish() {
  // Whatever was done to it, a reset brings it to rest, and afterwards it works.
  set(VIRTIO_MMIO_STATUS, 0);
  const bool reset = get(VIRTIO_MMIO_STATUS) == 0;
  const std::vector<std::string> state = device_->describe();
  if (device_->stop() && reset) return;
  for (const std::string& line : state) std::fprintf(stderr, "%s\n", line.c_str());
  std::fprintf(stderr, "the device did not come to rest\n");
  std::abort();
}

}  // namespace
}  // namespace minivmm::virtio

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace minivmm::virtio;
  size = std::min<size_t>(size, 16384);
  const bool chosen = size != 0 && data[0] >= FuzzChoices::kMark;
  Guest guest(FuzzChoices(chosen ? data[0] : uint8_t{0}));
  guest.run(Input({data + (chosen ? 1 : 0), size - (chosen ? 1 : 0)}));
  guest.finish();
  return 0;
}
