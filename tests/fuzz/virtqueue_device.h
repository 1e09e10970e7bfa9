// SPDX-License-Identifier: Apache-2.0
// The devices that the hostile guest of virtqueue_fuzz.cc may meet. The loop and the graph below
// them live as long as the process; a device as long as one input.
#pragma once

#include <string>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/loop_group.h"
#include "block/graph/graph.h"
#include "virtio/guest_memory.h"
#include "virtio/mmio_block.h"

namespace minivmm::virtio {

class FuzzWorld {
 public:
  static FuzzWorld& instance();
  base::EventLoop& loop() { return loops_.loop(0); }
  block::Graph& graph() { return graph_; }
  // Lets whatever can go on without waiting do so.
  void settle();

 private:
  FuzzWorld();

  base::LoopGroup loops_{1};
  block::Graph graph_;
};

// What the input has chosen.
struct FuzzChoices {
  static constexpr uint8_t kMark = 0xe0;  // above it a first byte is a choice

  // Of the low bits of a byte: 0 legacy, 1 entropy device, 2 read-only, 3 and 4 the disk.
  explicit FuzzChoices(uint8_t byte)
      : legacy((byte & 1) != 0),
        entropy((byte & 2) != 0),
        read_only((byte & 4) != 0),
        disk(byte >> 3 & 3) {}

  bool legacy;
  bool entropy;
  bool read_only;
  enum : uint8_t { kPlain, kSlow, kFailing, kLargeBlocks };
  uint8_t disk;
};

class FuzzDevice {
 public:
  virtual ~FuzzDevice() = default;
  virtual void read(uint64_t offset, std::span<std::byte> data) = 0;
  virtual void write(uint64_t offset, std::span<const std::byte> data) = 0;
  virtual void resize() = 0;
  virtual std::vector<std::string> describe() const = 0;
  // False if it does not come to rest.
  virtual bool stop() = 0;
};

constexpr uint16_t kFuzzQueues = 2;

std::unique_ptr<FuzzDevice> make_fuzz_device(FuzzChoices choices, const GuestMemory& memory,
                                             int irqfd);

}  // namespace minivmm::virtio
