// SPDX-License-Identifier: Apache-2.0
// What a hostile guest does: writes to every port and all over the device space, to a disk's
// registers out of order, and into its rings what no driver would. The host must live, and the disk
// must work again after a reset.
//
// Addresses given to the device are never in memory of ours that is in use: the device would be
// right to write there.
#include "arch.h"
#include "arena.h"
#include "job.h"
#include "stamp.h"

namespace minivmm::probe {
namespace {

constexpr uint64_t kAreaBytes = 1 << 17;
constexpr uint64_t kWindowBytes = 0x1000;
constexpr uint64_t kHoleBegin = 0xc0000000;
constexpr uint64_t kHoleEnd = 0xfec00000;  // from there on are interrupt controllers
constexpr uint64_t kWindowsBegin = 0xd0000000;
constexpr uint64_t kWindowsEnd = 0xd0020000;
constexpr uint64_t kHoleStep = 0x40000;
constexpr uint64_t kConfig = 0x100;
constexpr uint64_t kStatus = 0x70;

class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed) {}
  uint64_t next() { return mix64(++state_); }
  uint64_t below(uint64_t bound) { return next() % bound; }

 private:
  uint64_t state_;
};

// Ports that end the guest, or that its own interrupts and serial line depend on.
bool must_keep(unsigned port) {
  struct Range {
    unsigned first, last;
  };
  constexpr Range kKept[] = {{0x20, 0x21}, {0x40, 0x43},   {0xa0, 0xa1},   {0xf4, 0xf7},
                             {0x64, 0x64}, {0x3f8, 0x3ff}, {0x4d0, 0x4d1}, {0x600, 0x601}};
  for (const Range& range : kKept) {
    if (port >= range.first && port <= range.last) return true;
  }
  return false;
}

void sweep_ports(Rng& random) {
  for (unsigned port = 0; port <= 0xffff; ++port) {
    if (must_keep(port)) continue;
    (void)in8(static_cast<uint16_t>(port));
    out8(static_cast<uint16_t>(port), static_cast<uint8_t>(random.next()));
  }
}

template <typename T>
void touch(uint64_t address, uint64_t value) {
  auto* const at = reinterpret_cast<volatile T*>(address);
  *at = static_cast<T>(value);
  (void)*at;
}

void touch_any(uint64_t address, Rng& random) {
  const uint64_t value = random.below(3) == 0 ? random.below(4) : random.next();
  switch (random.below(4)) {
    case 0:
      return touch<uint8_t>(address, value);
    case 1:
      return touch<uint16_t>(address & ~uint64_t{1}, value);
    case 2:
      return touch<uint32_t>(address & ~uint64_t{3}, value);
    default:
      return touch<uint64_t>(address & ~uint64_t{7}, value);
  }
}

void sweep_hole(Rng& random) {
  for (uint64_t at = kHoleBegin; at < kHoleEnd; at += kHoleStep) {
    if (at >= kWindowsBegin && at < kWindowsEnd) continue;
    touch_any(at + random.below(kHoleStep - 8), random);
  }
}

// Registers that say where the rings are change nothing while the device runs; before that they
// would send the device's writes into our memory, so here it runs or is left without a queue.
void sweep_window(uint64_t window, Rng& random) {
  for (uint64_t at = 0; at < kWindowBytes; at += 4) {
    if (at == kStatus || at >= kConfig + 0x80) continue;
    touch_any(window + at, random);
  }
}

class Rings {
 public:
  Rings(Rng& random, uint8_t* data, uint8_t* tables)
      : random_(random), data_(data), tables_(tables) {}

  void scramble(Queue& queue) {
    auto* table = reinterpret_cast<Queue::Descriptor*>(queue.descriptor_address());
    for (unsigned i = 0; i < queue.size(); ++i) table[i] = descriptor(queue.size(), true);
    auto* indirect = reinterpret_cast<Queue::Descriptor*>(tables_);
    for (unsigned i = 0; i < kAreaBytes / sizeof *indirect; ++i) {
      indirect[i] = descriptor(256, random_.below(16) == 0);
    }
    fill_headers();
    auto* available = reinterpret_cast<volatile uint16_t*>(queue.available_address());
    for (unsigned i = 2; i < queue.size() + 3u; ++i) {
      available[i] = static_cast<uint16_t>(random_.below(16) == 0 ? random_.next()
                                                                  : random_.below(queue.size()));
    }
    available[0] = static_cast<uint16_t>(random_.below(4));
    // By a possible number mostly, so that chains are looked at.
    available[1] = static_cast<uint16_t>(
        available[1] + (random_.below(4) == 0 ? random_.next() : 1 + random_.below(queue.size())));
  }

 private:
  // Requests that a device could take, at places that may be behind the disk's end.
  void fill_headers() {
    auto* words = reinterpret_cast<uint32_t*>(data_);
    for (unsigned i = 0; i < kAreaBytes / 4; i += 4) {
      words[i] = random_.below(3) == 0 ? static_cast<uint32_t>(random_.below(16)) : kBlkIn;
      words[i + 1] = 0;
      words[i + 2] = static_cast<uint32_t>(random_.below(4096));
      words[i + 3] = random_.below(8) == 0 ? static_cast<uint32_t>(random_.next()) : 0;
    }
  }

  uint64_t address(bool table) {
    switch (random_.below(8)) {
      case 0:
        return random_.next() | uint64_t{1} << 40;  // where there is no memory
      case 1:
        return ~uint64_t{0} - random_.below(4096);
      case 2:
        return kHoleBegin + random_.below(kHoleEnd - kHoleBegin);
      default:
        return reinterpret_cast<uint64_t>(table ? tables_ : data_) +
               random_.below(kAreaBytes / 2) / 16 * 16;
    }
  }

  Queue::Descriptor descriptor(unsigned size, bool may_be_indirect) {
    constexpr uint32_t kLengths[] = {0, 1, 15, 16, 17, 512, 4096, 65536, 0xffffffff};
    Queue::Descriptor out;
    out.flags = static_cast<uint16_t>(random_.below(32) == 0 ? random_.next() & ~uint64_t{4}
                                                             : random_.below(4));
    const bool indirect = may_be_indirect && random_.below(4) == 0;
    if (indirect) out.flags = static_cast<uint16_t>(4 | (random_.below(8) == 0 ? 1 : 0));
    out.address = address(indirect);
    out.length = kLengths[random_.below(sizeof kLengths / sizeof *kLengths)];
    // A long one would reach from the area into what lies behind it.
    if (out.address < kHoleBegin && out.length > kAreaBytes / 2) out.length = kAreaBytes / 2;
    if (indirect) out.length = static_cast<uint32_t>(random_.below(40) * 16 + random_.below(2));
    out.next = static_cast<uint16_t>(random_.below(16) == 0 ? random_.next() : random_.below(size));
    return out;
  }

  Rng& random_;
  uint8_t* const data_;
  uint8_t* const tables_;
};

}  // namespace

void job_hostile(Disks& disks, Options& options, Result& result) {
  Disk* disk = prepare(disks, options, result);
  if (disk == nullptr) return;
  const Arena::Scope scope;
  auto* data = static_cast<uint8_t*>(Arena::allocate(kAreaBytes));
  auto* tables = static_cast<uint8_t*>(Arena::allocate(kAreaBytes));
  if (data == nullptr || tables == nullptr) {
    result.fail("not enough memory");
    return;
  }
  Rng random(options.seed);
  sweep_ports(random);
  sweep_hole(random);
  const uint64_t rounds = options.count == 0 ? 100 : options.count;
  Rings rings(random, data, tables);
  for (uint64_t round = 0; round < rounds; ++round) {
    for (unsigned q = 0; q < disk->queues(); ++q) {
      rings.scramble(disk->queue(q));
      disk->notify(q);
    }
    if (random.below(4) == 0) sweep_window(disk->window(), random);
    // A reset with whatever is in flight; then it must work.
    const StringView problem = disk->restart();
    if (!problem.empty()) {
      result.fail(problem);
      return;
    }
    Request request;
    request.data = data;
    request.length = 512;
    disk->begin({});
    if (!disk->run(request) || request.status != kBlkOk) {
      result.fail(disk->error().empty() ? status_text(request.status) : disk->error());
      return;
    }
  }
  result.keys().key("rounds", rounds);
}

}  // namespace minivmm::probe
